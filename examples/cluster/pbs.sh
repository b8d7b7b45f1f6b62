#!/usr/bin/env bash
# PBS: qsub FILE. Ranks save before the time limit; the job is then submitted again, and the run resumes.
#PBS -N hvdlm
#PBS -l select=2:ncpus=32:mpiprocs=4:ompthreads=8
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -r y
#PBS -j oe

cd "${PBS_O_WORKDIR:?}" || exit 1
if agent=$(command -v pbs_tmrsh); then
    export OMPI_MCA_plm_rsh_agent="$agent" PRTE_MCA_plm_ssh_agent="$agent"
fi
source .venv/bin/activate
set -uo pipefail
export OMP_NUM_THREADS=8
# The signal may arrive at any moment, even before the ranks run.
launcher="" signalled=no
request_save() {
    signalled=yes
    [ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null
}
trap request_save USR1

timeout --foreground --preserve-status --signal=USR1 $((86280 - SECONDS)) \
    "$(command -v mpirun)" -np 8 --hostfile "$PBS_NODEFILE" --bind-to none \
    -x PATH -x OMP_NUM_THREADS ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH} \
    python -m hvdlm --train.threads 8 --config examples/demo.yaml --log.run runs/demo --checkpoint.resume auto &
launcher=$!
[ "$signalled" = no ] || request_save
while wait "$launcher"; code=$?; [ "$signalled" = yes ]; do
    signalled=no # the signal ended the wait, not the run
done

if [ "$code" -eq 75 ]; then
    echo "hvdlm: stopped and saved, returning to the queue" >&2
    qsub "$0" || echo "hvdlm: could not return to the queue: submit the job again, and the run resumes" >&2
fi
exit "$code"
