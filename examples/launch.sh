#!/usr/bin/env bash
# Starts the ranks of one node of a Megatron training job; examples/sizes/*.sh call it.
#
# Usage: examples/sizes/SIZE.sh [--dry-run] [--mile-objective NAME] [FLAG ...]
#        examples/launch.sh NAME FLAG ...          the same for a model of your own
#
# A FLAG is any of Megatron's or a --mile flag; it wins over what the scripts set.
#   --mile-objective NAME   mile, ce, focal ...; none is Megatron's own loss (default: mile)
#   --mile-cpu              run on CPUs (without what needs Transformer Engine)
#   --dry-run               print the command, do not run it
#   --help                  print this text
#
# Environment variables (default):
#   OBJECTIVE        the same as --mile-objective
#   DATA_PATH        prefixes of .bin/.idx pairs, or WEIGHT PREFIX ...
#                    (mock data, unless a flag such as --data-args-path names data)
#   SPLIT            train, validation, test shares of the data         (989,10,1)
#   TOKENIZER_MODEL  file or folder; needed with DATA_PATH
#   TOKENIZER_TYPE   Llama2Tokenizer (SentencePiece), HuggingFaceTokenizer, ... (Llama2Tokenizer)
#   RUN_DIR          checkpoints, TensorBoard files, index cache        (runs/NAME-OBJECTIVE)
#                    a job started again with the same RUN_DIR resumes
#   TP, PP, CP       tensor, pipeline, context parallel sizes           (1)
#   MICRO_BATCH      sequences a rank computes at a time                (1; the sizes set theirs)
#   PRECISION        bf16 or fp32                                       (bf16)
#   MEGATRON_LM_DIR  Megatron-LM checkout whose pretrain_gpt.py runs    (examples/pretrain_gpt.py)
#   GPUS_PER_NODE    ranks of this node               (all GPUs of the node; without any TP*PP*CP)
#   NNODES           number of nodes; start one launcher on each        (1)
#   NODE_RANK        number of this node, from 0                        (0)
#   MASTER_ADDR, MASTER_PORT   address of node 0, needed with NNODES > 1; port (29500)
#   PYTHON           interpreter                              (.venv of the clone, else python3)
#
# SIGTERM makes the job save a checkpoint after the running step and end.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$root/examples/launch.sh"; }
fail() {
    echo "examples/launch.sh: error: $*" >&2
    exit 2
}

[[ ${1:---help} != -* ]] || set -- "" --help
name=$1
shift
objective=${OBJECTIVE:-mile} cpu='' dry_run='' data_flag='' flags=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --dry-run) dry_run=yes ;;
        --mile-objective) set -- "$1=${2:-}" "${@:3}" && continue ;;
        --mile-objective=*) objective=${1#*=} ;;
        --mile-cpu) cpu=yes flags+=("$1") ;;
        --data-path | --data-path=* | --data-args-path | --data-args-path=*)
            data_flag=whole flags+=("$1") ;;
        --per-split-data-args-path*) data_flag=split flags+=("$1") ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ $objective ]] || fail "--mile-objective: expected a name, such as mile"

for variable in TP PP CP MICRO_BATCH GPUS_PER_NODE NNODES; do
    [[ ${!variable:-1} =~ ^[1-9][0-9]*$ ]] ||
        fail "$variable=${!variable}: expected a whole number from 1"
done
tp=${TP:-1} pp=${PP:-1} cp=${CP:-1}
parallel=(
    --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp"
    --context-parallel-size "$cp" --micro-batch-size "${MICRO_BATCH:-1}"
)
# Sequence parallelism (which Megatron turns off where TP is 1) and the resume of the distributed
# optimizer need Transformer Engine or apex.
[[ $cpu ]] || parallel+=(
    --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
case ${PRECISION:-bf16} in
    bf16) precision=(--bf16) ;;
    fp32) precision=() ;;
    *) fail "PRECISION=$PRECISION: expected bf16 or fp32" ;;
esac

if [[ ${DATA_PATH:-} ]]; then
    [[ ${TOKENIZER_MODEL:-} ]] || fail "DATA_PATH is set; set TOKENIZER_MODEL too, as it was made"
    read -rd '' -a blend <<<"$DATA_PATH" || true  # false at the end of the text
    data=(--data-path "${blend[@]}" --split "${SPLIT:-989,10,1}")
    data+=(--tokenizer-type "${TOKENIZER_TYPE:-Llama2Tokenizer}")
    data+=(--tokenizer-model "$TOKENIZER_MODEL")
elif [[ $data_flag ]]; then
    data=()
    [[ $data_flag == split ]] || data=(--split "${SPLIT:-989,10,1}")
else
    data=(--mock-data --tokenizer-type NullTokenizer)
fi

run=${RUN_DIR:-runs/$name-${objective##*:}}  # of FILE.py:NAME the name
record=(
    --save "$run/checkpoints" --load "$run/checkpoints"
    --exit-signal-handler --exit-signal SIGURG
    --tensorboard-dir "$run/tensorboard" --data-cache-path "$run/cache"
    --log-interval 10 --log-throughput
)

script=$root/examples/pretrain_gpt.py
if [[ ${MEGATRON_LM_DIR:-} ]]; then
    script=$MEGATRON_LM_DIR/pretrain_gpt.py
    [[ -f $script ]] || fail "no $script; set MEGATRON_LM_DIR to a checkout of Megatron-LM"
fi

ranks=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
((ranks > 0)) || ranks=$((tp * pp * cp))
nodes=${NNODES:-1}
if ((nodes > 1)); then
    [[ ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes: set MASTER_ADDR to the address of node 0"
    where=(--node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR")
    where+=(--master-port "${MASTER_PORT:-29500}")
else
    # Port 0 lets the system choose a free one.
    where=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1)
fi

python=${PYTHON:-$root/.venv/bin/python}
[[ ${PYTHON:-} || -x $python ]] || python=python3
# Megatron's tensor parallelism wants one queue on GPUs before Blackwell, and torchrun would kill
# ranks that still write a checkpoint after 30 seconds.
command=(
    env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
    "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
    "$python" -m torch.distributed.run --signals-to-handle "SIGURG,SIGINT,SIGHUP,SIGQUIT"
    --nnodes "$nodes" --nproc-per-node "$ranks" "${where[@]}"
    -m megatron_mile.launch "$script" --mile-objective "$objective"
    "${parallel[@]}" "${precision[@]}" "${data[@]}" "${record[@]}" "${flags[@]}"
)
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
    exit
fi

# SIGTERM would also end helpers of the ranks, such as the one that Megatron keeps for checkpoints
# from the first one on. So only this shell takes it, once; torchrun (of PyTorch 2.10 or later)
# passes SIGURG on, which processes ignore by themselves, and the ranks save and end.
(trap '' TERM && exec "${command[@]}") &
job=$!
trap 'trap "" TERM && kill -URG "$job" || true' TERM
status=0
wait "$job" || status=$?
# A trapped signal ends `wait` early.
while kill -0 "$job" 2>/dev/null; do
    status=0
    wait "$job" || status=$?
done
exit "$status"
