#!/usr/bin/env bash
# LSF: bsub < FILE. Ranks save before time is over; the job is then queued again, and goes on from there.
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

set -uo pipefail
if agent=$(command -v blaunch); then
    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"
fi
module load openmpi
export OMP_NUM_THREADS=8
# The signal may come at any moment: to ranks that run, or just before they do.
step="" told=no
tell() {
    told=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
trap tell URG USR1

"$(command -v mpirun)" -np 8 --hostfile "$LSB_DJOB_HOSTFILE" --bind-to none \
    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH} \
    apptainer exec --nv --bind /scratch:/scratch hvdlm.sif \
    python -m hvdlm --train.threads 8 --config examples/demo.yaml --log.run /scratch/runs/demo --checkpoint.resume auto &
step=$!
[ "$told" = no ] || tell
while wait "$step"; code=$?; [ "$told" = yes ]; do
    told=no # the signal ended the wait, not the run
done
exit "$code"
