//! `LDM_CUDA_WGMMA`: which kernel takes a product where it is on, where it is off, and what it may be set to.

mod common;

use common::emulator::{self, Emulator};
use ldm::backend::cuda::{Cuda, Wgmma};
use ldm::backend::{Device, DeviceName};
use ldm::exec;
use ldm::ops::{Conv2d, Linear, Op};
use ldm::tensor::{DType, HostTensor, Shape, Spec};
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names the file that the child process writes what it found to.
const FOUND: &str = "LDM_TEST_WGMMA";

/// The emulator, for one test at a time.
fn start() -> Option<(Emulator, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match emulator::start() {
        Ok(Some(emulator)) => Some((emulator, turn)),
        Ok(None) => {
            println!("SKIPPED: LDM_TEST_DEVICE=cuda, and this is about the emulator");
            None
        }
        Err(why) => {
            common::skipped(&format!("no emulator: {why}"));
            None
        }
    }
}

fn open() -> ldm::Result<Cuda> {
    match Device::open(DeviceName::Cuda(0))? {
        Device::Cuda(cuda) => Ok(cuda),
        Device::Cpu => unreachable!("cuda:0 is asked for"),
    }
}

fn inputs(specs: &[Spec]) -> Vec<HostTensor> {
    let value = |i: usize| ((i * 37 % 61) as f64 - 30.0) / 32.0;
    let tensor = |s: &Spec| HostTensor::from_f64(*s, &(0..s.shape.numel()).map(value).collect::<Vec<_>>());
    specs.iter().map(|s| tensor(s).unwrap()).collect()
}

/// The kernel files that an op runs, of those with barriers, and the bytes of its result.
fn run(emulator: &Emulator, cuda: &Cuda, op: &Op, x: &[HostTensor]) -> (BTreeSet<String>, Vec<u8>) {
    emulator.reset();
    let y = exec::run_op(&Device::Cuda(cuda.clone()), op, x).unwrap_or_else(|e| panic!("{op:?}: {e}"));
    assert_eq!(emulator.report(), "");
    let stems = emulator.sites().iter().filter_map(|s| Some(s.split(':').nth(1)?.to_string())).collect();
    (stems, y[0].bytes().to_vec())
}

#[test]
fn every_tile_has_a_kernel_of_warpgroups_and_other_types_have_none() {
    let Some((emulator, _turn)) = start() else { return };
    emulator.configure("order=reverse;async=late");
    let cuda = open().unwrap();
    let conv = |dtype, c: usize, o: usize| {
        let shapes: [Shape; 3] = [[2, 8, 8, c].into(), [o, 3, 3, c].into(), [o].into()];
        (Op::from(Conv2d::same(3)), shapes.map(|s| Spec::new(dtype, s)).to_vec())
    };
    let linear = |dtype, c: usize, o: usize| {
        (Op::from(Linear::default()), vec![Spec::new(dtype, [150, c]), Spec::new(dtype, [o, c])])
    };
    let mut tiles = BTreeSet::new();
    for (op, specs) in [conv(DType::F16, 72, 168), linear(DType::BF16, 392, 176)] {
        let x = inputs(&specs);
        for op in op.choices(&specs) {
            let plan = op.launches(&specs)[0];
            if ![1, 3].contains(&plan.splits) {
                continue;
            }
            let [off, on, threads, boxes] = [Wgmma::Off, Wgmma::On, Wgmma::Threads, Wgmma::Tma]
                .map(|wgmma| run(&emulator, &cuda.with_wgmma(wgmma), &op, &x));
            let name = |stem: &str| BTreeSet::from([stem.to_string()]);
            assert_eq!((off.0, threads.0), (name("conv2d_mma"), name("conv2d_wgmma")), "{op:?}");
            assert_eq!(boxes.0, name("conv2d_tma"), "{op:?}");
            let large = plan.variant.starts_with("BM=128") || plan.variant.ends_with("BN=160");
            assert_eq!(on.0, name(if large { "conv2d_tma" } else { "conv2d_wgmma" }), "{op:?}");
            // On the emulator all add up the same products in the same order.
            assert!([on.1, threads.1, boxes.1].iter().all(|bytes| *bytes == off.1), "{op:?}: other bytes");
            tiles.insert(plan.variant);
        }
    }
    assert_eq!(tiles.len(), 7, "{tiles:?}");
    let cuda = cuda.with_wgmma(Wgmma::On);
    for ((op, specs), stem) in [
        (conv(DType::F32, 8, 16), Some("conv2d_f32")),
        (linear(DType::F32, 8, 16), Some("conv2d_f32")),
        (linear(DType::BF16, 8, 16), Some("conv2d_wgmma")),
        (linear(DType::BF16, 9, 16), Some("conv2d")),
    ] {
        let (stems, _) = run(&emulator, &cuda, &op, &inputs(&specs));
        assert_eq!(stems.iter().map(String::as_str).collect::<Vec<_>>(), Vec::from_iter(stem), "{specs:?}");
    }
}

#[test]
fn what_no_box_can_bring_is_copied_by_threads() {
    let Some((emulator, _turn)) = start() else { return };
    emulator.configure("order=forward;async=random:5");
    let cuda = open().unwrap().with_wgmma(Wgmma::Tma);
    let same = Conv2d::same(3);
    // Input, output channels.
    for (op, x, o, stem) in [
        (same.clone(), [3, 8, 8, 24], 40, "conv2d_tma"),
        (same.clone(), [1, 4, 64, 16], 24, "conv2d_tma"),
        (Conv2d { pad: [2, 0, 0, 2], ..same.clone() }, [2, 8, 8, 24], 40, "conv2d_tma"),
        (same.clone(), [2, 7, 8, 24], 40, "conv2d_wgmma"),
        (same.clone(), [1, 12, 12, 24], 40, "conv2d_wgmma"),
        (Conv2d { stride: 2, ..same.clone() }, [1, 16, 16, 24], 40, "conv2d_wgmma"),
        (Conv2d { upsample: true, ..same.clone() }, [1, 4, 4, 24], 40, "conv2d_wgmma"),
    ] {
        let shapes: [Shape; 3] = [x.into(), [o, 3, 3, x[3]].into(), [o].into()];
        let specs = shapes.map(|s| Spec::new(DType::BF16, s));
        let op = Op::from(op);
        let x = inputs(&specs);
        let (stems, bytes) = run(&emulator, &cuda, &op, &x);
        assert_eq!(stems, BTreeSet::from([stem.to_string()]), "{op:?}");
        assert!(bytes == run(&emulator, &cuda.with_wgmma(Wgmma::Off), &op, &x).1, "{op:?}: other bytes");
    }
}

#[test]
fn the_switch_is_on_unless_it_is_set() {
    const NAME: &str = "the_switch_is_on_unless_it_is_set";
    if start().is_none() {
        return;
    }
    if let Some(file) = std::env::var_os(FOUND) {
        let cuda = open().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(cuda.capability(), (9, 0), "the emulator's");
        assert!(Wgmma::ALL.iter().all(|(_, wgmma)| cuda.with_wgmma(*wgmma).wgmma() == *wgmma));
        return std::fs::write(file, format!("{:?}", cuda.wgmma())).unwrap();
    }
    let of = |value: Option<&str>| {
        let file = std::env::temp_dir().join(format!("ldm-wgmma-{}-{value:?}", std::process::id()));
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", NAME, "--nocapture"]).env(FOUND, &file).env_remove("LDM_CUDA_WGMMA");
        value.map(|value| child.env("LDM_CUDA_WGMMA", value));
        let out = child.output().unwrap();
        let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        let _ = std::fs::remove_file(&file);
        (found, said)
    };
    for (value, want) in [
        (None, "On"),
        (Some(""), "On"),
        (Some("on"), "On"),
        (Some("off"), "Off"),
        (Some("threads"), "Threads"),
        (Some("tma"), "Tma"),
    ] {
        let (found, said) = of(value);
        assert_eq!(found, want, "{value:?}: {said}");
    }
    let (found, said) = of(Some("maybe"));
    assert!(
        found.is_empty() && said.contains("LDM_CUDA_WGMMA: want on or off or threads or tma; got `maybe`"),
        "{said}"
    );
}
