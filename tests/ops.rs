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

/// A case in a type: its inputs, and by the specification its outputs and their sizes, once for all schedules and kernels.
struct Trial {
    room: &'static str,
    number: usize,
    case: Case,
    dtype: DType,
    inputs: Vec<HostTensor>,
    want: Vec<Array>,
    size: Vec<Array>,
}

impl Trial {
    fn new(room: &'static str, number: usize, case: Case, dtype: DType) -> Trial {
        let arrays = case.inputs(dtype, 100 + number as u64);
        let rounded = arrays.iter().zip(case.specs(dtype)).map(|(a, s)| a.to_tensor(s));
        let inputs = rounded.collect::<Result<_, _>>().expect("arrays of the shapes of their case");
        let (want, size) = (case.op.spec(&arrays), case.op.magnitude(&arrays));
        Trial { room, number, case, dtype, inputs, want, size }
    }

    /// Runs the case and compares each output with the specification.
    fn check(&self, device: &Device) -> Result<(), String> {
        let (op, inputs) = (&self.case.op, &self.inputs);
        let err = |e: ldm::Error| format!("{}: {e}", self.case.name(self.dtype));
        match device {
            Device::Cpu => {
                let got = exec::run_op(device, op, inputs).map_err(err)?;
                if let Some(weight) = op.packed() {
                    let packed = run_packed(op, inputs, weight).map_err(err)?;
                    if packed != got {
                        return Err(format!(
                            "{}: a packed weight gives another result",
                            self.case.name(self.dtype)
                        ));
                    }
                }
                self.compare(&got)
            }
            Device::Cuda(cuda) => {
                let run = |cuda: &Cuda, in_place| {
                    run_apart(cuda, op, inputs, in_place).map_err(err).and_then(|got| self.compare(&got))
                };
                if has_wgmma(op, &self.case.specs(self.dtype))
                    && cuda.with_wgmma(Wgmma::On).wgmma() == Wgmma::On
                {
                    // Each kernel by itself: `On` is a choice of two of them.
                    for wgmma in [Wgmma::Off, Wgmma::Threads, Wgmma::Tma] {
                        run(&cuda.with_wgmma(wgmma), false).map_err(|e| format!("wgmma {wgmma:?}: {e}"))?;
                    }
                } else {
                    run(cuda, false)?;
                }
                if op.in_place().is_empty() { Ok(()) } else { run(cuda, true) }
            }
        }
    }

    /// Compares each output with the specification, in norm and element by element.
    fn compare(&self, got: &[HostTensor]) -> Result<(), String> {
        let t = self.dtype;
        let factor = self.case.loose.map_or(1.0, |(f, _)| f);
        let err = |e: String| Err(format!("{}: {e}", self.case.name(t)));
        for (j, got) in got.iter().enumerate() {
            // A result in a coarser type than the inputs is rounded to that type.
            let dtype = got.spec().dtype;
            let coarse = if dtype.eps() > t.eps() { dtype } else { t };
            let (ours, theirs, size) = (got.to_f64(), &self.want[j].data, &self.size[j].data);
            if ours.len() != theirs.len() {
                return err(format!("output {j} has {} elements, want {}", ours.len(), theirs.len()));
            }
            let wrong = |i: usize| format!("output {j}[{i}]: want {}; got {}", theirs[i], ours[i]);
            if dtype == DType::I32 {
                if let Some(i) = (0..ours.len()).find(|&i| ours[i] != theirs[i]) {
                    return err(wrong(i));
                }
                continue;
            }
            let eps =
                if dtype == DType::F32 && coarse == DType::F32 { DType::F32.eps() } else { coarse.eps() };
            let (mut diff, mut norm) = (0.0, 0.0);
            for i in 0..ours.len() {
                // An infinity has no distance to measure: it must be that infinity.
                if theirs[i].is_infinite() && ours[i] == theirs[i] {
                    continue;
                }
                let d = (ours[i] - theirs[i]).abs();
                let bound = 8.0 * eps * size[i] * factor + smallest(dtype);
                if !(d <= bound) {
                    return err(format!("{}; off by {d:e}, bound {bound:e}", wrong(i)));
                }
                diff += d * d;
                norm += theirs[i] * theirs[i];
            }
            // Where the exact result is zero or nearly so, the elementwise bound alone speaks.
            let scale: f64 = size.iter().map(|v| v * v).sum();
            let bound = norm_bound(coarse) * factor;
            if norm > 1e-4 * scale && diff.sqrt() > bound * norm.sqrt() {
                let rel = (diff / norm).sqrt();
                return err(format!("output {j}: relative error {rel:e}, bound {bound:e}"));
            }
        }
        Ok(())
    }
}

/// The trials of a room, in each type that its cases are for.
fn trials(name: &str) -> Vec<Trial> {
    let room = ROOMS.iter().find(|r| r.name == name).expect("the list and its macro agree");
    let numbered = cases(room).into_iter().enumerate();
    numbered
        .flat_map(|(i, case)| case.types.iter().map(move |&t| Trial::new(room.name, i, case.clone(), t)))
        .collect()
}

fn run(trials: &[Trial], device: &Device) {
    for trial in trials {
        if let Err(e) = trial.check(device) {
            panic!("{}: case {}: {e}", trial.room, trial.number);
        }
    }
}

macro_rules! suite {
    ($($file:ident : $($Op:ident),+ ;)+) => {
        $(mod $file {
            #[test]
            fn cpu() {
                $(super::run(&super::trials(<ldm::ops::$Op as ldm::ops::Operation>::NAME), &ldm::backend::Device::Cpu);)+
            }

            #[test]
            fn cuda() {
                let rooms = [$(<ldm::ops::$Op as ldm::ops::Operation>::NAME),+];
                super::common::in_processes(rooms.len(), |i| {
                    let trials = super::trials(rooms[i]);
                    super::common::on_cuda(|device| super::run(&trials, device));
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
    let right = Trial::new("activation", 0, case, DType::F32);
    let spec = right.inputs[0].spec();
    let compared = |y: &Array| right.compare(&[y.to_tensor(spec).unwrap()]);
    assert!(compared(&right.want[0]).is_ok());
    let x: Vec<_> = right.inputs.iter().map(Array::from_tensor).collect();
    assert!(compared(&Op::from(Activation(Act::GeluTanh)).spec(&x)[0]).is_err());
    for wrong in [f64::NAN, right.want[0].data[17] + 1e-5, 0.0] {
        let mut y = right.want[0].clone();
        y.data[17] = wrong;
        assert!(compared(&y).is_err(), "{wrong}");
    }
}
