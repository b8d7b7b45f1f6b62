#!/usr/bin/env bash
# LSF: bsub < FILE. Ranks save before the time limit; the job is then queued again, and the run resumes.
#BSUB -J hvdlm
#BSUB -n 8
#BSUB -R "span[ptile=4]"
#BSUB -R "affinity[core(8)]"
#BSUB -gpu "num=4"
#BSUB -W 24:00
#BSUB -q gpu
#BSUB -wa URG
#BSUB -wt 2
#BSUB -Q 75
#BSUB -r
#BSUB -o hvdlm-%J.out

if agent=$(command -v blaunch); then
    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"
fi
module load openmpi
set -uo pipefail
export OMP_NUM_THREADS=8
# The signal may arrive at any moment, even before the ranks run.
launcher="" signalled=no
request_save() {
    signalled=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null
}
trap request_save URG USR1

"$(command -v mpirun)" -np 8 --hostfile "$LSB_DJOB_HOSTFILE" --bind-to none \
    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH} \
    apptainer exec --nv --bind /scratch:/scratch hvdlm.sif \
    python -m hvdlm --train.threads 8 --config examples/demo.yaml --log.run /scratch/runs/demo --checkpoint.resume auto &
launcher=$!
[ "$signalled" = no ] || request_save
while wait "$launcher"; code=$?; [ "$signalled" = yes ]; do
    signalled=no # the signal ended the wait, not the run
done
exit "$code"
