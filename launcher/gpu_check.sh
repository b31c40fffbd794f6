#!/usr/bin/env bash
# What works on this machine's GPUs, in about ten minutes on 1 to 8 of them: run this first.
#   bash launcher/gpu_check.sh [--output DIR]
# It trains a small model a few steps at a time and prints a table: NCCL and bf16, every DeepSpeed configuration with
# rank changes and a resume, another number of GPUs, FlashAttention where it is installed, NF4, export and merge, losses
# against plain PyTorch and PEFT, vLLM over all GPUs, the time of a step against PEFT's, and planned against measured
# memory. Exit code 0: nothing failed; 1: something did; 2: there is no GPU.
# --device cpu checks what a CPU can. --model FOLDER --data FILE replace the small model and its data.
set -euo pipefail

output= device=cuda model= data= words=()
while [ $# -gt 0 ]; do
    case $1 in
    --output) output=${2:?--output needs a folder}; shift 2 ;;
    --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
    --model) model=${2:?--model needs a folder}; shift 2 ;;
    --data) data=${2:?--data needs a file}; shift 2 ;;
    --processes) words+=(--processes "${2:?--processes needs a number}"); shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) printf 'gpu_check: unknown argument %s; known are --output, --device, --model, --data and --processes\n' "$1" >&2; exit 2 ;;
    esac
done
if [ "$device" = cuda ] && ! { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }; then
    printf 'gpu_check: there is no GPU here (nvidia-smi -L names none): run it on a machine with one, or give --device cpu\n' >&2
    exit 2
fi
absolute() { case $1 in '' | /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }
output=$(absolute "$output") model=$(absolute "$model") data=$(absolute "$data")

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$DYNRANK_ROOT"
output=${output:-$DYNRANK_ROOT/runs/gpu_check}
if [ -z "$model" ]; then
    model=$DYNRANK_ROOT/.cache/smollm2-135m-instruct
    python launcher/smollm2.py --output "$model"
fi
if [ -z "$data" ]; then
    data=$DYNRANK_ROOT/.cache/gsm_symbolic/train.jsonl
    [ -f "$data" ] || python -m dynrank_ds.data.gsm_symbolic --output "$(dirname "$data")"
fi
exec python -m launcher.gpu_check --device "$device" --model "$model" --data "$data" --output "$output" "${words[@]}"
