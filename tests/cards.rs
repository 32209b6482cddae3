//! Cards with less than those of sm_80 and sm_90: the same results.

mod common;

use ldm::backend::cuda::Wgmma;
use ldm::backend::{Device, DeviceName};
use ldm::exec;
use ldm::ops::{Case, Op, ROOMS};
use ldm::tensor::{DType, HostTensor};

/// Shared memory of a block, at most, on sm_86, sm_89 and sm_120.
const SMALL: usize = 99 * 1024;

/// The cases of products that ask for the tile which such a card has no room for.
fn of_the_largest_tile() -> Vec<Case> {
    let rooms = ROOMS.iter().filter(|r| ["conv2d", "linear"].contains(&r.name));
    let cases = rooms.flat_map(|r| (r.cases)()).filter(|c| !c.bench);
    let choice = |op: &Op| match op {
        Op::Conv2d(op) => op.choice,
        Op::Linear(op) => op.choice,
        _ => None,
    };
    cases.filter(|c| choice(&c.op).is_some_and(|c| c.variant == "BM=128,BN=160")).collect()
}

#[test]
fn a_tile_that_a_card_has_no_room_for_is_two_smaller_ones() {
    let Some(emulator) = common::emulator::start().unwrap_or_else(|why| {
        common::skipped(&format!("no emulator: {why}"));
        None
    }) else {
        return;
    };
    let cases = of_the_largest_tile();
    assert!(cases.len() >= 4, "{}", cases.len());
    let run = |case: &Case, x: &[HostTensor], shared: usize| -> Vec<Vec<u8>> {
        emulator.reset();
        emulator.configure(&format!("shared={shared}"));
        // Such cards multiply by warps.
        let device = match Device::open(DeviceName::Cuda(0)).unwrap() {
            Device::Cuda(cuda) => Device::Cuda(cuda.with_wgmma(Wgmma::Off)),
            Device::Cpu => unreachable!("cuda:0 is asked for"),
        };
        let y = exec::run_op(&device, &case.op, x).unwrap_or_else(|e| panic!("{}: {e}", case.title()));
        assert_eq!(emulator.report(), "", "{}", case.title());
        y.iter().map(|t| t.bytes().to_vec()).collect()
    };
    for case in &cases {
        let x: Vec<_> = case
            .inputs(DType::BF16, 5)
            .iter()
            .zip(case.specs(DType::BF16))
            .map(|(a, spec)| a.to_tensor(spec).unwrap())
            .collect();
        // Sums run over the same blocks of channels in the same order, whatever the tile.
        assert!(run(case, &x, SMALL) == run(case, &x, 227 * 1024), "{}", case.title());
    }
}

#[test]
fn no_kernel_wants_more_than_such_a_card_has_but_that_tile() {
    let larger: Vec<_> = ldm::kernels::UNITS
        .iter()
        .filter(|u| u.smem > SMALL && !(u.stem == "conv2d_mma" && u.variant == "BM=128,BN=160"))
        // Which other cards have no instructions for.
        .filter(|u| !["conv2d_wgmma", "conv2d_tma"].contains(&u.stem))
        .map(|u| format!("{u}: {} bytes", u.smem))
        .collect();
    assert!(larger.is_empty(), "{larger:?}");
}
