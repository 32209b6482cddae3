#!/usr/bin/env bash
# The CUDA code on a real card, on a machine that has an NVIDIA driver and no Rust.
#
#   tools/gpu.sh pack    on the machine that builds (with nvcc): fills dist/gpu with stripped binaries and this script
#   ./gpu.sh             in a copy of that folder, on the machine with the card: runs every test of a room or a model that
#                        has CUDA code, then the benches; prints a table, writes results/results.json and the logs
#
# Not measured on a GPU yet: nothing here claims a speed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

pack() {
    cd "$here/.."
    rm -rf dist/gpu
    mkdir -p dist/gpu/bin
    echo '*' >dist/.gitignore
    # Cargo says `Executable benches/ops.rs (target/release/deps/ops-0123)`; in the release profile it is stripped.
    local kind path
    { cargo test --release --no-run --test ops --test models && cargo bench --no-run --bench ops --bench steps; } 2>&1 |
        tee /dev/stderr | sed -nE 's/^ *Executable (tests|benches)\/.*\((.*)\)$/\1 \2/p' |
        while read -r kind path; do
            cp "$path" "dist/gpu/bin/$kind-$(basename "$path" | sed 's/-[0-9a-f]*$//')"
        done
    mkdir -p dist/gpu/tests
    cp -r tests/golden dist/gpu/tests/
    cp tools/gpu.sh dist/gpu/
    git describe --always --dirty --abbrev=12 >dist/gpu/commit
    du -sh dist/gpu
}

# Lines `name<TAB>ok|FAILED` of a test binary's log, and `name<TAB>ns<TAB>±ns` of a bench's.
tests_of() { sed -nE 's/^test (.*) \.\.\. (ok|FAILED)$/\1\t\2/p' "$1"; }
benches_of() {
    sed -nE 's/^test (.*) \.\.\. bench: +([0-9,]+) ns\/iter \(\+\/- ([0-9,]+)\)$/\1\t\2\t\3/p' "$1" | tr -d ,
}

run() {
    cd "$here"
    mkdir -p results
    export LDM_TEST_DEVICE=cuda LDM_BENCH_DEVICE=cuda CRITERION_HOME=$here/results/criterion
    export CARGO_MANIFEST_DIR=$here LDM_BENCH_MODEL=$here/tests/golden/sd15-tiny
    : >results/tests.tsv
    : >results/benches.tsv
    local card bin name code=0
    card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
    printf '%s\n\n' "$card"
    for bin in bin/tests-*; do
        name=${bin#bin/tests-}
        # A binary that crashes leaves no result for what it did not reach: its exit code counts too.
        "$bin" cuda --test-threads=1 >"results/$name.log" 2>&1 || { code=1; tail -n 40 "results/$name.log"; }
        tests_of "results/$name.log" | sed "s/^/$name: /" >>results/tests.tsv
    done
    awk -F '\t' '{ printf "%-60s %s\n", $1, $2 }' results/tests.tsv
    for bin in bin/benches-*; do
        name=${bin#bin/benches-}
        "$bin" --bench --noplot --output-format bencher >"results/bench-$name.log" 2>&1 ||
            { code=1; tail -n 40 "results/bench-$name.log"; }
        benches_of "results/bench-$name.log" >>results/benches.tsv
    done
    echo
    awk -F '\t' '{ printf "%-90s %12.3f us  ± %.3f\n", $1, $2 / 1e3, $3 / 1e3 }' results/benches.tsv
    {
        printf '{\n"card": "%s",\n"commit": "%s",\n"date": "%s",\n' "$card" "$(cat commit)" "$(date -u +%FT%TZ)"
        awk -F '\t' 'BEGIN { printf "\"tests\": [" }
            { printf "%s\n  {\"name\": \"%s\", \"ok\": %s}", sep, $1, $2 == "ok" ? "true" : "false"; sep = "," }
            END { print "\n]," }' results/tests.tsv
        awk -F '\t' 'BEGIN { printf "\"benches\": [" }
            { printf "%s\n  {\"name\": \"%s\", \"ns\": %s, \"plus_minus\": %s}", sep, $1, $2, $3; sep = "," }
            END { print "\n]\n}" }' results/benches.tsv
    } >results/results.json
    printf '\n%s tests, %s failed; %s\n' "$(wc -l <results/tests.tsv)" "$(grep -c FAILED results/tests.tsv || true)" \
        "$here/results/results.json"
    # A list that is empty has found nothing wrong because it has tried nothing.
    [ -s results/tests.tsv ] && [ -s results/benches.tsv ] && return "$code"
    echo "no test or no bench left a result: see $here/results"
    return 1
}

case ${1:-run} in
pack) pack ;;
run) run ;;
*) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
