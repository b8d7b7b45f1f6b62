#!/usr/bin/env bash
# PBS: qsub FILE. Ranks save before time is over; the job is then submitted again, and goes on from there.
#PBS -N hvdlm
#PBS -l select=2:ncpus=32:mpiprocs=4:ompthreads=8
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -r y
#PBS -j oe

set -uo pipefail
cd "$PBS_O_WORKDIR" || exit 1
if agent=$(command -v pbs_tmrsh); then
    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"
fi
source .venv/bin/activate
export OMP_NUM_THREADS=8
# The signal may come at any moment: to ranks that run, or just before they do.
step="" told=no
tell() {
    told=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
trap tell USR1

timeout --foreground --preserve-status --signal=USR1 $((86280 - SECONDS)) \
    "$(command -v mpirun)" -np 8 --hostfile "$PBS_NODEFILE" --bind-to none \
    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH} \
    python -m hvdlm --train.threads 8 --config examples/demo.yaml --log.run runs/demo --checkpoint.resume auto &
step=$!
[ "$told" = no ] || tell
while wait "$step"; code=$?; [ "$told" = yes ]; do
    told=no # the signal ended the wait, not the run
done

if [ "$code" -eq 75 ]; then
    echo "hvdlm: stopped and saved, back into the queue" >&2
    qsub "$0" || echo "hvdlm: that failed: submit the job again, it goes on from there" >&2
fi
exit "$code"
