#!/usr/bin/env bash
# The CUDA code on a real card, on a machine that has an NVIDIA driver and no Rust.
#
#   tools/gpu.sh pack    on the machine that builds (with nvcc): fills dist/gpu with stripped binaries and this script
#   tools/gpu.sh probes FILE    there too: compiles tools/probes*.cu alone
#
# and in a copy of that folder, on the machine with the card, in this order:
#
#   ./gpu.sh test        every room against its specification, then the models, each test in a process of its own
#   ./gpu.sh step        a step of Stable Diffusion 1.5 at 512×512, its UNet, and the decoder, node by node, in bf16; the step in f32
#   ./gpu.sh overlap     that step, UNet and decoder in bf16 with LDM_CUDA_OVERLAP off and on, twice in turn; then the tests with it off
#   ./gpu.sh wgmma       the same with LDM_CUDA_WGMMA off, on, threads and tma (products by whole warpgroups, on a Hopper card); then the sweep of
#                        its tiles in bf16
#   ./gpu.sh probe       how fast the card's units, products and copies are at most, and what a kernel costs that does nothing; of
#                        wgmma, on a Hopper card, also whether products of known integers are right
#   ./gpu.sh sweep       the heaviest products of that step and of the decoder with every tile and number of splits, in bf16 and f32
#   ./gpu.sh bench       every real shape of every room in bf16; of one room with `./gpu.sh bench conv2d`
#   ./gpu.sh profile     what keeps the kernels of an evaluation waiting, by ncu where there is one
#   ./gpu.sh torch       the UNet and the same shapes in PyTorch, eager and compiled, where python3 has it
#   ./gpu.sh train       a training step of the UNet of SD 1.5, batch 16, bf16, with and without blocks made again, and PyTorch's
#   ./gpu.sh report      what there is, as a table and as results/results.json
#   ./gpu.sh             all of that
#
# Results go to $OUT, or to `results` beside this script. A part that is done is not done again, so a call that was ended
# is simply repeated. A call stops itself after LDM_GPU_SECONDS (540) with exit code 3 where something is left; a test that
# failed is exit code 1.
#
# What came of it on an H100 and an H200 is in benches/measured and README.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
budget=${LDM_GPU_SECONDS:-540}
code=0

# nvcc of LDM_NVCC, of the path, or of the wheels in VIRTUAL_ENV, as build.rs looks for it.
probes() {
    cd "$here/.."
    local nvcc objects flags=(-std=c++17 -O3 -DT_BF16 -Ikernels --allow-unsupported-compiler)
    nvcc=$(command -v "${LDM_NVCC:-nvcc}" || ls "${VIRTUAL_ENV:-/}"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
    objects=$(mktemp -d)
    trap "rm -rf '$objects'" EXIT
    "$nvcc" "${flags[@]}" -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -c -o "$objects/probes.o" tools/probes.cu
    # Hopper's own instructions, which no other card is asked to run.
    "$nvcc" "${flags[@]}" -gencode arch=compute_90a,code=sm_90a -c -o "$objects/wgmma.o" tools/probes_wgmma.cu
    "$nvcc" -L"$(dirname "$nvcc")/../lib" --allow-unsupported-compiler -gencode arch=compute_80,code=sm_80 -o "$1" "$objects"/*.o
}

pack() {
    cd "$here/.."
    rm -rf dist/gpu
    mkdir -p dist/gpu/bin dist/gpu/tests
    echo '*' >dist/.gitignore
    # Cargo says `Executable benches/ops.rs (target/release/deps/ops-0123)`; in the release profile it is stripped.
    local kind path
    {
        cargo test --release --no-run --test ops --test models --test attention --test norms --test replay
        cargo bench --no-run --bench ops --bench steps --bench sweep
    } 2>&1 | tee /dev/stderr | sed -nE 's/^ *Executable (tests|benches)\/.*\((.*)\)$/\1 \2/p' |
        while read -r kind path; do
            cp "$path" "dist/gpu/bin/$kind-$(basename "$path" | sed 's/-[0-9a-f]*$//')"
        done
    cargo build --release --bin ldm --example 03_train
    cp "${CARGO_TARGET_DIR:-target}"/release/{ldm,examples/03_train} dist/gpu/bin/
    probes dist/gpu/bin/probes
    cp -r tests/golden dist/gpu/tests/
    cp tools/gpu.sh tools/gpu_torch.py tools/gpu_unet.py tools/gpu_train.py dist/gpu/
    git describe --always --dirty --abbrev=12 >dist/gpu/commit
    du -sh dist/gpu
}

# Seconds that this call may still take.
left() { echo $((budget - SECONDS)); }

stop() {
    report
    echo "$1: call again"
    exit 3
}

# attempt NAME COMMAND...: runs a command unless it has run before; its output goes to NAME.log. 0: done, now or before; 3: no
# time for it in this call.
attempt() {
    local name=$1 status=0
    shift
    [ -e "$out/done/$name" ] && return 0
    [ "$(left)" -ge 20 ] || return 3
    timeout "$(left)" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
    if [ "$status" = 124 ] && [ "$(left)" -lt 5 ]; then
        # With a whole call to itself it would take too long again.
        if [ -e "$out/late/$name" ]; then
            echo "$name: takes longer than $budget s" | tee -a "$out/$name.log"
        else
            touch "$out/late/$name"
            return 3
        fi
    fi
    echo "$status" >"$out/done/$name"
    return 0
}

# attempt, which says what failed, and ends the call where time is out.
once() {
    attempt "$@" || stop "out of time in $1"
    local status
    status=$(cat "$out/done/$1")
    [ "$status" = 0 ] || { code=1; printf '%s: exit code %s\n' "$1" "$status"; tail -n 20 "$out/$1.log"; }
}

# Several at once: most of a test's time is its specification, on the processor. `run_test no-overlap` runs them with
# LDM_CUDA_OVERLAP=off, `run_test off`, `threads` and `tma` with LDM_CUDA_WGMMA set to that, under names of their own.
run_test() {
    local bin test only list=() jobs way=
    case ${1:-} in
    no-overlap) way=no-overlap-; export LDM_CUDA_OVERLAP=off ;;
    off | threads | tma) way=wgmma-$1-; export LDM_CUDA_WGMMA=$1 ;;
    esac
    for bin in ops models attention norms replay; do
        # Rooms are tested with every kernel that LDM_CUDA_WGMMA chooses at once.
        case $way$bin in wgmma-*-ops) continue ;; esac
        # Of rooms and models, the tests on the GPU are those of this name.
        only=
        case $bin in ops | models) only=cuda ;; esac
        while read -r test; do
            list+=("$bin $test")
        done < <("bin/tests-$bin" ${only:+"$only"} --list 2>/dev/null | sed -n 's/: test$//p')
    done
    jobs=$(($(nproc) / 2 + 1))
    for test in "${list[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
        bin=${test% *} test=${test#* }
        attempt "test-$way$bin-${test//::/-}" "bin/tests-$bin" "$test" --exact --test-threads=1 &
    done
    while [ -n "$(jobs -rp)" ]; do wait -n || true; done
    for test in "${list[@]}"; do
        bin=${test% *} test=${test#* }
        once "test-$way$bin-${test//::/-}" "bin/tests-$bin" "$test" --exact --test-threads=1
        printf '%-60s %s\n' "$way$bin $test" "$([ "$(cat "$out/done/test-$way$bin-${test//::/-}")" = 0 ] && echo ok || echo FAILED)"
    done
    unset LDM_CUDA_OVERLAP LDM_CUDA_WGMMA
}

# One file of `ldm bench` per part: time by events, memory, and every node.
run_step() {
    local name part dtype
    while read -r name part dtype; do
        once "$name" bin/ldm bench --preset sd15 --component "$part" -W 512 -H 512 --dtype "$dtype" --device cuda \
            --warmup 5 --iterations 50 --per-op --top 0 --json "$out/$name.json"
        tail -n 40 "$out/$name.log"
    done <<<$'sd15-step step bf16\nsd15-unet unet bf16\nsd15-vae-decoder vae-decoder bf16\nsd15-step-f32 step f32'
}

# switched NAME VARIABLE VALUE...: with a switch at each of its values, in turn: a card's clocks drift. Without --per-op, whose events between
# kernels keep them apart.
switched() {
    local turn part switch name
    for turn in 1 2; do
        for part in unet vae-decoder step; do
            for switch in "${@:3}"; do
                name=$1-$part-$switch-$turn
                once "$name" env "$2=$switch" bin/ldm bench --preset sd15 --component "$part" -W 512 -H 512 --dtype bf16 \
                    --device cuda --warmup 5 --iterations 50 --json "$out/$name.json"
                printf '%s: ' "$name"
                grep -m 1 '^evaluation' "$out/$name.log" || true
            done
        done
    done
}

# Kernels one after the other, and each started while the one before it ends, which is what tests run with otherwise.
run_overlap() {
    switched overlap LDM_CUDA_OVERLAP off on
    run_test no-overlap
}

# Products by warps and by whole warpgroups, whose operands threads or tensor copies bring.
run_wgmma() {
    local way
    switched wgmma LDM_CUDA_WGMMA off on threads tma
    for way in off threads tma; do run_test $way; done
    LDM_CUDA_WGMMA=threads sweep bf16 sweep-threads
    LDM_CUDA_WGMMA=tma sweep bf16 sweep-tma
}

# The card's units, one by one, are in tools/probes.cu, wgmma in tools/probes_wgmma.cu. P-7, the peak of mma.sync from registers, is among the first;
# probe-peak is what the engine's own product reaches, by wgmma on Hopper. P-5, what lies
# between two kernels: a model so small that its kernels do next to nothing, from one graph and launched one by one; the
# time of an evaluation divided by `nodes` of the file.
run_probe() {
    local graph part
    for part in units wgmma; do
        once "probe-$part" sh -c "bin/probes ${part#units} >'$out/$part.tmp'; s=\$?; [ \"\$(tail -n 1 '$out/$part.tmp')\" != ']}' ] || mv '$out/$part.tmp' '$out/probe-$part.json'; exit \$s"
        [ ! -e "$out/probe-$part.json" ] || sed -n 's/.*"name": "\([^"]*\)", "value": \([0-9.]*\), "unit": "\([^"]*\)".*/\1: \2 \3/p' "$out/probe-$part.json"
    done
    once probe-peak bin/ldm bench -m tests/golden/sd15-tiny --component text --dtype bf16 --device cuda --roofline \
        --json "$out/probe-peak.json"
    for graph in on off; do
        once "probe-launch-$graph" env LDM_CUDA_GRAPH=$graph bin/ldm bench -m tests/golden/sd15-tiny --component step \
            --dtype bf16 --device cuda --warmup 10 --iterations 100 --json "$out/probe-launch-$graph.json"
    done
    cat "$out"/probe-*.log
}

run_bench() {
    local room
    while read -r room; do
        [ -z "${1:-}" ] || [ "$room" = "$1" ] || continue
        once "bench-$room" bin/benches-ops --bench --noplot --output-format bencher "^$room/.* bf16 "
        benches_of "$out/bench-$room.log" | awk -F '\t' '{ printf "%-100s %12.3f us  ± %.3f\n", $1, $2 / 1e3, $3 / 1e3 }'
    done < <(bin/benches-ops --bench --list 2>/dev/null | sed -n 's/\/.* bf16 .*: benchmark$//p' | uniq)
    [ -n "${1:-}" ] || once bench-steps bin/benches-steps --bench --noplot --output-format bencher
}

# sweep DTYPE NAME: every line of NAME.jsonl is one launch; what the room would take is `chosen`; `wgmma`, the value of LDM_CUDA_WGMMA, where warpgroups multiplied.
sweep() {
    # It stops by itself, and goes on where it stopped.
    local status=0
    bin/benches-sweep --dtype "$1" --out "$out/$2.jsonl" --seconds "$(left)" >>"$out/$2.log" 2>&1 || status=$?
    [ "$status" != 3 ] || stop "out of time in the sweep"
    [ "$status" = 0 ] || { code=1; tail -n 5 "$out/$2.log"; }
    printf '%s: %s launches measured\n' "$2" "$(wc -l <"$out/$2.jsonl")"
}

run_sweep() {
    sweep bf16 sweep-bf16
    sweep f32 sweep-f32
}

# One line of CSV for each launch: its units' use, its stalls, its traffic. Of the kernels that a step spends its time in; the
# first of them, since each is run again for every group of counters.
run_profile() {
    command -v ncu >/dev/null || { echo "no ncu: left out"; return 0; }
    local sections=(SpeedOfLight WarpStateStats SchedulerStats LaunchStats Occupancy ComputeWorkloadAnalysis MemoryWorkloadAnalysis)
    once profile env LDM_CUDA_GRAPH=off ncu --clock-control none "${sections[@]/#/--section=}" --page raw --csv --kill yes \
        -k 'regex:conv2d|linear_group|attention|norm|stats' -c "${LDM_PROFILE_LAUNCHES:-120}" \
        bin/ldm bench --preset sd15 --component unet -W 512 -H 512 --dtype bf16 --device cuda --warmup 0 --iterations 1
}

run_torch() {
    python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no PyTorch with CUDA: left out"; return 0; }
    local mode dtype status
    # What a call has compiled and tuned, the next one finds again.
    export TORCHINDUCTOR_CACHE_DIR=$out/inductor
    while read -r mode dtype; do
        once "torch-unet-$mode-$dtype" python3 gpu_unet.py --mode "$mode" --dtype "$dtype" --out "$out/torch-unet.jsonl"
        tail -n 1 "$out/torch-unet-$mode-$dtype.log"
    done <<<$'eager bf16\ncompiled bf16\nmax-autotune bf16\neager f32'
    for mode in eager compiled; do
        # It stops by itself, and goes on where it stopped.
        status=0
        python3 gpu_torch.py --shapes tests/golden/kernels/plans.tsv --mode $mode --out "$out/torch-$mode.jsonl" \
            --seconds "$(left)" || status=$?
        [ "$status" != 3 ] || stop "out of time in gpu_torch.py"
        [ "$status" = 0 ] || code=1
    done
}

# A step that does not fit says so before it takes any memory: then half the batch is tried. PyTorch gets the batch that fits
# ours, and halves it too where it must.
run_train() {
    local name flag batch fits mode
    export LDM_COMMIT TORCHINDUCTOR_CACHE_DIR=$out/inductor
    LDM_COMMIT=$(cat commit)
    for flag in --recompute ''; do
        for batch in 16 8 4; do
            name=sd15-train${flag#-}-$batch
            set -- "$name" bin/03_train --preset sd15 64 $batch 3 --device cuda --dtype bf16 --ema --per-op $flag --json "$out/$name.json"
            attempt "$@" || stop "out of time in $name"
            fits=$(field fits "$out/$name.json")
            [ "$fits" != false ] || { echo "$name: does not fit"; continue; }
            once "$@"
            sed -n '/^median/,+12p' "$out/$name.log"
            break
        done
    done
    python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no PyTorch with CUDA: left out"; return 0; }
    for mode in eager compiled; do
        once "torch-train-$mode" python3 gpu_train.py --mode $mode --batch "$batch" --out "$out/torch-train.jsonl"
        tail -n 1 "$out/torch-train-$mode.log"
    done
}

# What a file of JSON, or a line of it, says first under a key; empty where there is no such file.
field() {
    if [ -e "${2:-/dev/stdin}" ]; then grep -oE "\"$1\": *(\"[^\"]*\"|[^],}]*)" "${2:-/dev/stdin}" | head -n 1 | sed -E 's/^[^:]*: *"?//; s/"$//' || true; fi
}

# Training steps beside each other: batch, seconds, and memory, which for ours is what was planned, and taken before the first step.
trained() {
    local file line name error
    row() { awk -v name="$1" -v batch="$2" -v s="$3" -v bytes="$4" 'BEGIN {
        printf "%-52s %6s %9s %7s\n", name, batch, s == "" ? "" : sprintf("%.3f", s), bytes == "" ? "" : sprintf("%.1f", bytes / 1e9) }'; }
    for file in "$out"/sd15-train*.json; do
        [ -e "$file" ] || continue
        name=ldm
        [ "$(field recompute "$file")" = false ] || name='ldm, blocks made again'
        [ "$(field fits "$file")" = true ] || name="$name: does not fit"
        row "$name" "$(field batch "$file")" "$(field median_seconds "$file")" \
            $(($(field states_bytes "$file") + $(field arena_bytes "$file")))
    done
    [ ! -e "$out/torch-train.jsonl" ] || while read -r line; do
        name="PyTorch $(field torch <<<"$line") $(field mode <<<"$line")" error=$(field error <<<"$line")
        if [ -n "$error" ]; then
            name="$name: $error"
        elif [ "$(field mode <<<"$line")" != eager ]; then
            name="$name (first step $(field first_seconds <<<"$line") s)"
        fi
        row "$name" "$(field batch <<<"$line")" "$(field median_seconds <<<"$line")" "$(field peak_bytes <<<"$line")"
    done <"$out/torch-train.jsonl"
}

# Lines `name<TAB>ns<TAB>±ns` of a bench's log.
benches_of() {
    sed -nE 's/^test (.*) \.\.\. bench: +([0-9,]+) ns\/iter \(\+\/- ([0-9,]+)\)$/\1\t\2\t\3/p' "$1" | tr -d ,
}

# JSON lines as the elements of a list.
lines_of() {
    local file
    for file in "$@"; do
        if [ -e "$file" ]; then cat "$file"; fi
    done | awk '{ printf "%s\n  %s", sep, $0; sep = "," }'
}

# One JSON file of all there is. The names hold no quotes and no backslashes.
report() {
    local file name sep
    {
        printf '{\n"card": "%s",\n"commit": "%s",\n"date": "%s",\n"tests": [' "$card" "$(cat commit)" "$(date -u +%FT%TZ)"
        sep=
        for file in "$out"/done/test-*; do
            [ -e "$file" ] || continue
            name=${file##*/test-}
            printf '%s\n  {"name": "%s", "ok": %s}' "$sep" "$name" "$([ "$(cat "$file")" = 0 ] && echo true || echo false)"
            sep=,
        done
        printf '\n],\n"benches": ['
        for file in "$out"/bench-*.log; do
            if [ -e "$file" ]; then benches_of "$file"; fi
        done | awk -F '\t' '{ printf "%s\n  {\"name\": \"%s\", \"ns\": %s, \"plus_minus\": %s}", sep, $1, $2, $3; sep = "," }'
        printf '\n],\n"torch": ['
        lines_of "$out"/torch-*.jsonl
        printf '\n],\n"sweep": ['
        lines_of "$out"/sweep-*.jsonl
        printf '\n]'
        for file in "$out"/sd15-*.json "$out"/overlap-*.json "$out"/wgmma-*.json "$out"/probe-*.json; do
            [ -e "$file" ] || continue
            name=$(basename "$file" .json)
            printf ',\n"%s": ' "$name"
            cat "$file"
        done
        printf '\n}\n'
    } >"$out/results.json"
    local steps
    steps=$(trained)
    [ -z "$steps" ] || printf '\n%-52s %6s %9s %7s\n%s\n' "training step, SD 1.5, 512x512, bf16" batch seconds GB "$steps"
    local failed tests
    tests=$(find "$out/done" -name 'test-*' | wc -l)
    failed=$(find "$out/done" -name 'test-*' -exec grep -Lx 0 {} + | wc -l)
    printf '\n%s: %s tests, %s failed; %s benches; %s\n' "$card" "$tests" "$failed" \
        "$(cat "$out"/bench-*.log 2>/dev/null | grep -c ' bench: ' || true)" "$out/results.json"
    # A list that is empty has found nothing wrong because it has tried nothing.
    [ "$tests" -gt 0 ] || { echo "no test has run: ./gpu.sh test"; code=1; }
    [ "$failed" = 0 ] || code=1
}

usage() { sed -n '2,/^set /p' "$0" | sed -n 's/^# \{0,1\}//p'; }

prepare() {
    cd "$here"
    out=${OUT:-$here/results}
    mkdir -p "$out/done" "$out/late"
    export LDM_TEST_DEVICE=cuda LDM_BENCH_DEVICE=cuda CRITERION_HOME=$out/criterion
    export CARGO_MANIFEST_DIR=$here LDM_BENCH_MODEL=$here/tests/golden/sd15-tiny
    card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
    printf '%s\n\n' "$card"
}

what=${1:-all}
case $what in
pack)
    pack
    ;;
probes)
    probes "${2:?a file to write}"
    ;;
test | step | overlap | wgmma | probe | sweep | bench | profile | torch | train | report | all)
    prepare
    for part in test step overlap wgmma probe sweep bench profile torch train; do
        if [ "$what" = all ] || [ "$what" = $part ]; then "run_$part" "${2:-}"; fi
    done
    report
    ;;
-h | --help)
    usage
    ;;
*)
    usage
    exit 2
    ;;
esac
exit "$code"
