#!/usr/bin/env bash
# A Ray cluster in a Slurm allocation that runs one search space: sbatch deploy/slurm.sh SPACE.yaml [adgrid options]
# Every node sees the same files; .venv holds adgrid with the extras cluster and search. A job that hits its time limit
# is submitted again as it is: finished rows are kept. See docs/cluster.md.
#SBATCH --job-name=adgrid
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=240G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

space=${1:?usage: sbatch deploy/slurm.sh SPACE.yaml [adgrid options]}
shift
project=${SLURM_SUBMIT_DIR:-$PWD}
results=${ADGRID_ROOT:-$project/results}
data=${ADGRID_DATA:-$project/data}
cache=${ADGRID_CACHE:-${SLURM_TMPDIR:-/tmp}/adgrid-$USER}
source "${ADGRID_VENV:-$project/.venv}/bin/activate"

# One token for all nodes of this job and for nobody else; who may read the file may run code on the cluster.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$results/.ray-token-${SLURM_JOB_ID:-local}"
mkdir -p "$results"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port

finish() {
  rm -f "$RAY_AUTH_TOKEN_PATH"
  kill "${started[@]}" 2>/dev/null || true
  wait || true
}
started=()
trap finish EXIT
trap 'exit 143' TERM

ray_start=(ray start --block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}")
ray_start+=(--num-gpus="${SLURM_GPUS_ON_NODE:-0}")
srun --nodes=1 --ntasks=1 --nodelist="$head" "${ray_start[@]}" --head --port="$port" --include-dashboard=false &
started+=($!)
for node in "${nodes[@]:1}"; do
  sleep 1 # so that two on one node's switch do not ask for the same port
  srun --nodes=1 --ntasks=1 --nodelist="$node" "${ray_start[@]}" --address="$address" &
  started+=($!)
done

# The plan is refused until enough nodes are there; a node that never comes leaves its places empty.
for _ in $(seq 60); do
  alive=$(python - "$address" <<'PYTHON' || true
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PYTHON
)
  if [[ "${alive:-0}" -ge "${#nodes[@]}" ]]; then break; fi
  sleep 5
done

adgrid run "$space" --address "$address" --root "$results" --data-root "$data" --cache-dir "$cache" "$@"
