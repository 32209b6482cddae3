//! Every room against its specification, on the same inputs rounded to the type under test: CPU code, and CUDA code on
//! the emulator or on a card. The rooms come from the list; none is named here.

mod common;

use ldm::backend::Device;
use ldm::backend::cuda::{Call, Cuda, Operand, Wgmma};
use ldm::exec::{self, Program, Weights};
use ldm::graph::{Graph, Layout};
use ldm::kernels;
use ldm::ops::launch::LaunchPlan;
use ldm::ops::{Array, Case, Op, ROOMS, Room};
use ldm::rng::Small;
use ldm::tensor::{DType, HostTensor, Spec};

/// Seeded random cases per room.
const RANDOM: usize = 64;

/// Small cases: the listed ones that are not benches, and the random ones.
fn cases(room: &Room) -> Vec<Case> {
    let mut r = Small::new(0x1d);
    let listed = (room.cases)().into_iter().filter(|c| !c.bench);
    let random = (0..RANDOM).map(|_| (room.random)(&mut r));
    listed.chain(random).collect()
}

/// Bound in norm.
fn norm_bound(t: DType) -> f64 {
    match t {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        DType::I32 => 0.0,
    }
}

/// What rounding to a type costs next to zero: half the distance of its subnormal numbers; nothing for those of f32, which
/// may be flushed.
fn smallest(t: DType) -> f64 {
    if t == DType::F16 { 0.5f64.powi(25) } else { f64::from(f32::MIN_POSITIVE) }
}

/// Runs an op with every value in an allocation of its own, so that the emulator's guard bands and poison stand around
/// each of them. With `in_place`, outputs take over the memory of the inputs that the op says they may.
fn run_apart(cuda: &Cuda, op: &Op, x: &[HostTensor], in_place: bool) -> Result<Vec<HostTensor>, ldm::Error> {
    let specs: Vec<_> = x.iter().map(HostTensor::spec).collect();
    let outputs = op.infer(&specs)?;
    let mut buffers = Vec::new();
    for t in x {
        let buffer = cuda.alloc(t.bytes().len())?;
        cuda.upload(&buffer, 0, t.bytes())?;
        buffers.push(buffer);
    }
    let mut place = Vec::new();
    for (j, spec) in outputs.iter().enumerate() {
        let shared = op.updates().iter().chain(if in_place { op.in_place() } else { &[] });
        place.push(match shared.into_iter().find(|(output, _)| *output == j) {
            Some(&(_, input)) => input,
            None => {
                buffers.push(cuda.alloc(spec.bytes())?);
                buffers.len() - 1
            }
        });
    }
    let operand = |spec: &Spec, at: usize| Operand { spec: *spec, ptr: buffers[at].ptr() };
    let xs: Vec<_> = specs.iter().enumerate().map(|(i, s)| operand(s, i)).collect();
    let ys: Vec<_> = outputs.iter().zip(&place).map(|(s, &at)| operand(s, at)).collect();
    let scratch_bytes = op.scratch(&specs, &outputs);
    let scratch = cuda.alloc(scratch_bytes.max(1))?;
    let (node, device) = (op.name(), cuda);
    op.cuda(&Call { device, node, x: &xs, y: &ys, scratch: scratch.ptr(), scratch_bytes })?;
    let read = |(spec, &at): (&Spec, &usize)| {
        let mut bytes = vec![0; spec.bytes()];
        cuda.download(&buffers[at], 0, &mut bytes)?;
        HostTensor::from_bytes(*spec, &bytes)
    };
    outputs.iter().zip(&place).map(read).collect()
}

/// Runs an op on the CPU with one input as models hold it: a weight that was packed when it was loaded.
fn run_packed(op: &Op, x: &[HostTensor], weight: usize) -> Result<Vec<HostTensor>, ldm::Error> {
    let (mut g, mut weights) = (Graph::new(), Weights::new(&Device::Cpu));
    let mut vars = Vec::new();
    for (i, x) in x.iter().enumerate() {
        let Spec { dtype, shape } = x.spec();
        vars.push(if i == weight {
            let layout = if shape.len() == 4 { Layout::Conv } else { Layout::Linear };
            weights.insert_as("w", x, layout)?;
            g.weight("w", layout, dtype, shape)?
        } else {
            g.input(&format!("x{i}"), dtype, shape)
        });
    }
    let y = g.push_all(op.name(), op.clone(), &vars)?;
    y.iter().enumerate().for_each(|(i, &v)| g.output(&format!("y{i}"), v));
    let mut program = Program::new(g, &weights, &Device::Cpu)?;
    for (i, x) in x.iter().enumerate().filter(|(i, _)| *i != weight) {
        program.write(&format!("x{i}"), x)?;
    }
    program.run(&mut ())?;
    (0..y.len()).map(|i| program.read(&format!("y{i}"))).collect()
}

/// Whether a launch has a kernel of warpgroups beside its own, `x_wgmma` beside `x_mma`, which `LDM_CUDA_WGMMA` chooses; where there
/// is one whose copies are boxes of tensors, it is of the same tiles.
fn has_wgmma(op: &Op, x: &[Spec]) -> bool {
    let twin = |p: &LaunchPlan| Some(format!("{}_wgmma", p.stem.strip_suffix("_mma")?));
    let unit = |p: &LaunchPlan| kernels::unit(&twin(p)?, p.dtype.name(), p.variant);
    op.launches(x).iter().any(|p| unit(p).is_some())
}

/// Runs a case and compares each output with the specification.
fn check(device: &Device, case: &Case, t: DType, seed: u64) -> Result<(), String> {
    let arrays = case.inputs(t, seed);
    let specs = case.specs(t);
    let err = |e: ldm::Error| format!("{}: {e}", case.name(t));
    let inputs: Vec<HostTensor> =
        (arrays.iter().zip(&specs)).map(|(a, &s)| a.to_tensor(s)).collect::<Result<_, _>>().map_err(err)?;
    match device {
        Device::Cpu => {
            let got = exec::run_op(device, &case.op, &inputs).map_err(err)?;
            if let Some(weight) = case.op.packed() {
                let packed = run_packed(&case.op, &inputs, weight).map_err(err)?;
                if packed != got {
                    return Err(format!("{}: a packed weight gives another result", case.name(t)));
                }
            }
            compare(case, t, &arrays, &got)
        }
        Device::Cuda(cuda) => {
            compare(case, t, &arrays, &run_apart(cuda, &case.op, &inputs, false).map_err(err)?)?;
            for (name, wgmma) in Wgmma::ALL {
                let other = cuda.with_wgmma(wgmma);
                if has_wgmma(&case.op, &specs) && other.wgmma() == wgmma && wgmma != cuda.wgmma() {
                    let got = run_apart(&other, &case.op, &inputs, false).map_err(err)?;
                    compare(case, t, &arrays, &got).map_err(|e| format!("wgmma {name}: {e}"))?;
                }
            }
            match case.op.in_place() {
                [] => Ok(()),
                _ => compare(case, t, &arrays, &run_apart(cuda, &case.op, &inputs, true).map_err(err)?),
            }
        }
    }
}

/// Compares each output with the specification, in norm and element by element.
fn compare(case: &Case, t: DType, arrays: &[Array], got: &[HostTensor]) -> Result<(), String> {
    let (want, size) = (case.op.spec(arrays), case.op.magnitude(arrays));
    let factor = case.loose.map_or(1.0, |(f, _)| f);
    for (j, got) in got.iter().enumerate() {
        // A result in a coarser type than the inputs is rounded to that type.
        let dtype = got.spec().dtype;
        let coarse = if dtype.eps() > t.eps() { dtype } else { t };
        let (ours, theirs) = (got.to_f64(), &want[j].data);
        if ours.len() != theirs.len() {
            return Err(format!(
                "{}: output {j} has {} elements, want {}",
                case.name(t),
                ours.len(),
                theirs.len()
            ));
        }
        if dtype == DType::I32 {
            if let Some(i) = (0..ours.len()).find(|&i| ours[i] != theirs[i]) {
                return Err(format!(
                    "{}: output {j}[{i}]: want {}; got {}",
                    case.name(t),
                    theirs[i],
                    ours[i]
                ));
            }
            continue;
        }
        let eps = if dtype == DType::F32 && coarse == DType::F32 { DType::F32.eps() } else { coarse.eps() };
        let (mut diff, mut norm) = (0.0, 0.0);
        for i in 0..ours.len() {
            // An infinity has no distance to measure: it must be that infinity.
            if theirs[i].is_infinite() && ours[i] == theirs[i] {
                continue;
            }
            let d = (ours[i] - theirs[i]).abs();
            let bound = 8.0 * eps * size[j].data[i] * factor + smallest(dtype);
            if !(d <= bound) {
                return Err(format!(
                    "{}: output {j}[{i}]: want {}; got {}; off by {d:e}, bound {bound:e}",
                    case.name(t),
                    theirs[i],
                    ours[i]
                ));
            }
            diff += d * d;
            norm += theirs[i] * theirs[i];
        }
        // Where the exact result is zero or nearly so, the elementwise bound alone speaks.
        let scale: f64 = size[j].data.iter().map(|v| v * v).sum();
        let bound = norm_bound(coarse) * factor;
        if norm > 1e-4 * scale && diff.sqrt() > bound * norm.sqrt() {
            let rel = (diff / norm).sqrt();
            return Err(format!("{}: output {j}: relative error {rel:e}, bound {bound:e}", case.name(t)));
        }
    }
    Ok(())
}

fn run(room: &Room, device: &Device) {
    for (i, case) in cases(room).iter().enumerate() {
        for &t in case.types {
            if let Err(e) = check(device, case, t, 100 + i as u64) {
                panic!("{}: case {i}: {e}", room.name);
            }
        }
    }
}

/// The room of this name.
fn room(name: &str) -> &'static Room {
    ROOMS.iter().find(|r| r.name == name).expect("the list and its macro agree")
}

macro_rules! suite {
    ($($file:ident : $($Op:ident),+ ;)+) => {
        $(mod $file {
            #[test]
            fn cpu() {
                $(super::run(super::room(<ldm::ops::$Op as ldm::ops::Operation>::NAME), &ldm::backend::Device::Cpu);)+
            }

            #[test]
            fn cuda() {
                super::common::on_cuda(|device| {
                    $(super::run(super::room(<ldm::ops::$Op as ldm::ops::Operation>::NAME), device);)+
                });
            }
        })+
    };
}
ldm::rooms!(suite);

#[test]
fn every_room_has_cases_and_its_own_name() {
    let mut names: Vec<_> = ROOMS.iter().map(|r| r.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ROOMS.len());
    for room in ROOMS {
        let listed = (room.cases)().into_iter().filter(|c| !c.bench).count();
        assert!(listed >= 8, "{}: {listed} listed cases, want at least 8", room.name);
    }
}

#[test]
fn a_wrong_result_is_found() {
    // The harness itself: the results of another op, or a single wrong element, must fail.
    use ldm::ops::{Act, Activation, t};
    let case = Case::new(Activation(Act::Gelu), [t([40])]);
    let x = case.inputs(DType::F32, 1);
    let spec = case.specs(DType::F32)[0];
    let compared = |y: &Array| compare(&case, DType::F32, &x, &[y.to_tensor(spec).unwrap()]);
    let right = case.op.spec(&x).remove(0);
    assert!(compared(&right).is_ok());
    assert!(compared(&ldm::ops::Op::from(Activation(Act::GeluTanh)).spec(&x)[0]).is_err());
    for wrong in [f64::NAN, right.data[17] + 1e-5, 0.0] {
        let mut y = right.clone();
        y.data[17] = wrong;
        assert!(compared(&y).is_err(), "{wrong}");
    }
}
