# What a developer runs. `just` alone lists it.

set shell := ["bash", "-euo", "pipefail", "-c"]

_list:
    @just --list --unsorted

# Format, lints, documentation: no warning passes
check:
    cargo fmt --all --check
    cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# Every test, or those whose name contains a word: `just test conv2d`
test *words:
    cargo test {{words}}

# Every room's real shapes, or one room's: `just bench conv2d` (LDM_BENCH_DEVICE=cuda for a GPU)
bench *words:
    cargo bench --bench ops -- {{words}}

# Write the counts that CI compares with: after a change that lowers them
bench-counts:
    .ci/run counts write

# Whole models: text encoder, UNet evaluation, decoder (LDM_BENCH_MODEL=FOLDER for another checkpoint)
steps:
    cargo bench --bench steps

# Fails without nvcc, or where a kernel spills.
# Compile the kernels; list what each needs, and the launch planned for every real shape
kernels:
    cargo run --release --example kernels | tee /dev/stderr | tail -n 1 | grep -q 'no spill, no stack$'

# Record what is planned for every real shape: after a change that predicts a better time
plans:
    LDM_RECORD_PLANS=1 cargo test --test plans no_shape_is_planned_worse_than_recorded

# Every room under 16 schedules of the emulator instead of 3; each kind of training run killed 20 times
soak:
    LDM_SOAK=1 LDM_REQUIRE_EMULATOR=1 cargo test --test ops
    LDM_KILLS=20 cargo test --test kills --test conditions -- --nocapture bit_for_bit

# Fill dist/gpu with what a machine with a GPU and no Rust needs
gpu-pack: kernels
    tools/gpu.sh pack

# On another machine: ./gpu.sh in a copy of dist/gpu.
# Run dist/gpu here, or a part of it: test, step, overlap, wgmma, probe, sweep, bench, profile, torch, train, report
gpu *part:
    dist/gpu/gpu.sh {{part}}

# What CI runs
ci:
    .ci/run
