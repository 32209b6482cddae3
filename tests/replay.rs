//! What a program on a GPU runs again and again is one launch: the same results as node by node, and nothing else asked of
//! the driver.

mod common;

use common::emulator::Emulator;
use ldm::backend::Device;
use ldm::backend::cuda::{COUNTERS, Call, Operand, Wgmma};
use ldm::diffusion::{Sampling, Settings};
use ldm::exec::{Hook, Program, Weights};
use ldm::graph::{Graph, Layout, Node};
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model};
use ldm::ops::{Act, Activation, Add, Op, Running};
use ldm::pipeline::{Blueprint, Observer, Pipeline, Request, load};
use ldm::rng::Generator;
use ldm::samplers::{Ladder, Method};
use ldm::tensor::{DType, HostTensor, Spec};
use std::path::{Path, PathBuf};

/// A hook that sees every node, and so keeps a program from being one launch.
struct Watch(Vec<String>);

impl Hook for Watch {
    fn before(&mut self, _: usize, node: &Node) -> ldm::Result<()> {
        self.0.push(node.label.clone());
        Ok(())
    }
}

fn random(shape: &[usize], seed: u64) -> HostTensor {
    HostTensor::f32(shape, Generator::new(seed).randn(shape.iter().product())).unwrap()
}

/// The emulator, where the test runs on it.
fn emulator() -> Option<Emulator> {
    common::emulator::start().unwrap_or_default()
}

/// What the driver was asked for so far.
#[derive(PartialEq, Debug, Clone, Copy)]
struct Asked {
    graphs: u64,
    launches: u64,
    allocations: u64,
}

fn asked(e: &Emulator) -> Asked {
    let (graphs, launches, allocations) = (e.count("graph"), e.count("launch"), e.count("alloc"));
    Asked { graphs, launches, allocations }
}

/// The folder is looked up when the test runs: on another machine (tools/gpu.sh) it is elsewhere.
fn model() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&root).join("tests/golden/sd15-tiny")
}

/// A model on a device, from which runs are made.
struct Tiny {
    blueprint: Blueprint,
    weights: Weights,
    method: Method,
    ladder: Ladder,
    device: Device,
}

impl Tiny {
    fn on(device: &Device, steps: usize) -> Tiny {
        let folder = ModelFolder::open(model()).unwrap();
        let blueprint = Blueprint::read(&folder).unwrap();
        let inventory = Inventory::of(&blueprint.unet.inventory(DType::F32).unwrap());
        let weights = load(folder.checkpoint("unet").unwrap(), &inventory, device).unwrap();
        let (method, schedule) = blueprint.choose(&Request::default()).unwrap();
        let ladder = method.ladder(&schedule, steps, 0).unwrap();
        Tiny { blueprint, weights, method, ladder, device: device.clone() }
    }

    fn run(&self) -> Sampling {
        let unet = &self.blueprint.unet;
        let settings =
            Settings { batch: 1, size: [8, 8], tokens: 7, guidance: 3.0, known: false, dtype: DType::F32 };
        let mut run =
            Sampling::new(unet, &self.weights, &self.device, (self.method, &self.ladder), settings).unwrap();
        run.set_context(&self.context(1)).unwrap();
        self.start(&mut run);
        run
    }

    fn width(&self) -> usize {
        self.blueprint.unet.context
    }

    fn context(&self, seed: u64) -> HostTensor {
        random(&[2, 7, self.width()], seed)
    }

    fn start(&self, run: &mut Sampling) {
        run.start(&random(&[1, 8, 8, self.blueprint.unet.out_channels], 3)).unwrap();
    }
}

#[test]
fn an_evaluation_is_one_launch_with_the_results_of_its_nodes() {
    common::on_cuda(|device| {
        let tiny = Tiny::on(device, 5);
        let (mut run, mut watched) = (tiny.run(), tiny.run());
        let mut nodes = 0;
        for k in 0..run.evaluations() {
            let before = emulator().map(|e| asked(&e));
            run.step().unwrap();
            if let (Some(before), Some(e)) = (before, emulator()) {
                let now = asked(&e);
                assert_eq!(now.graphs - before.graphs, u64::from(k > 0), "evaluation {k}");
                assert!(k == 0 || now.allocations == before.allocations, "evaluation {k}");
                assert!(k < 2 || now.launches == before.launches, "evaluation {k}");
            }
            let mut labels = Watch(vec![]);
            watched.step_with(&mut labels).unwrap();
            nodes = labels.0.len();
            assert_eq!(run.state().unwrap(), watched.state().unwrap(), "evaluation {k}");
            assert_eq!(run.guided().unwrap(), watched.guided().unwrap(), "evaluation {k}");
        }
        assert!(run.program().launches().unwrap() >= nodes, "{:?}, {nodes}", run.program().launches());
        assert_eq!(watched.program().launches(), None);

        // Another prompt: its keys and values are computed, the launch is the same.
        let mut states = vec![];
        for run in [&mut run, &mut watched] {
            run.set_context(&tiny.context(2)).unwrap();
            tiny.start(run);
        }
        for k in 0..2 {
            let before = emulator().map(|e| asked(&e));
            run.step().unwrap();
            if let (Some(before), Some(e)) = (before, emulator()) {
                let now = asked(&e);
                assert_eq!((now.graphs - before.graphs, now.allocations), (1, before.allocations));
                assert_eq!(now.launches > before.launches, k == 0, "evaluation {k}");
            }
            watched.step_with(&mut Watch(vec![])).unwrap();
            assert_eq!(run.state().unwrap(), watched.state().unwrap(), "evaluation {k} of another prompt");
            states.push(run.state().unwrap());
        }
        assert_ne!(states[0], states[1]);
    });
}

/// The evaluation after the second has no finite context: steps until that is an error, and the error.
fn broken(run: &mut Sampling, tiny: &Tiny) -> (usize, String) {
    (0..2).for_each(|_| assert!(run.step().unwrap()));
    let mut context = tiny.context(1).to_f32();
    context[5] = f32::NAN;
    run.set_context(&HostTensor::f32(tiny.context(1).shape(), context).unwrap()).unwrap();
    loop {
        match run.step() {
            Ok(more) => assert!(more, "the end, and no error"),
            Err(e) => return (run.done(), e.to_string()),
        }
    }
}

fn names_what_is_not_finite(device: &Device, late: usize) {
    let tiny = Tiny::on(device, 12);
    let mut run = tiny.run();
    let n = run.evaluations();
    let (done, e) = broken(&mut run, &tiny);
    assert!(e.contains("attn2.to_k\" made NaN") && e.contains(&format!("in evaluation 3 of {n}")), "{e}");
    assert_eq!(done, 3 + late);
    assert!(run.state().unwrap_err().to_string().contains("start again"));
    // The program is none the worse.
    run.set_context(&tiny.context(1)).unwrap();
    tiny.start(&mut run);
    let mut fresh = tiny.run();
    for _ in 0..2 {
        run.step().unwrap();
        fresh.step().unwrap();
    }
    assert_eq!(run.state().unwrap(), fresh.state().unwrap());

    // Whoever reads, or changes what is read, hears of it at once.
    for read in [
        |run: &mut Sampling, _: &Tiny| run.state().map(|_| ()),
        |run: &mut Sampling, _: &Tiny| run.guided().map(|_| ()),
        |run: &mut Sampling, tiny: &Tiny| run.set_context(&tiny.context(1)),
    ] {
        tiny.start(&mut run);
        run.set_context(
            &HostTensor::f32(tiny.context(1).shape(), vec![f32::INFINITY; 14 * tiny.width()]).unwrap(),
        )
        .unwrap();
        let e = run.step().and_then(|_| read(&mut run, &tiny)).unwrap_err().to_string();
        assert!(e.contains("attn2.to_k\" made") && e.contains("in evaluation 1 of"), "{e}");
        run.set_context(&tiny.context(1)).unwrap();
    }
}

#[test]
fn a_value_that_is_not_finite_names_its_node_on_a_cpu_at_once() {
    names_what_is_not_finite(&Device::Cpu, 0);
}

#[test]
fn a_value_that_is_not_finite_names_its_node_after_eight_replays_at_most() {
    common::on_cuda_with(&common::SCHEDULES[..1], |device| names_what_is_not_finite(device, 7));
}

#[test]
fn a_fault_of_the_driver_is_an_error_that_says_which_call() {
    let Some(e) = emulator() else { return common::skipped("faults are the emulator's") };
    common::on_cuda_with(&common::SCHEDULES[..1], |device| {
        let tiny = Tiny::on(device, 5);
        for (fault, fails_at, says) in [
            ("graph:1", 1, &["cuGraphLaunch", "LDM_CUDA_GRAPH=off"][..]),
            ("graph:3", 3, &["cuGraphLaunch", "failed"]),
            ("launch:4", 1, &["failed \""]),
        ] {
            let mut run = tiny.run();
            run.step().unwrap();
            // Waits: `reset` forgets what is queued, and the device zeroes the counters of split sums once only.
            run.state().unwrap();
            e.configure(&format!("fail={fault}"));
            for _ in 1..fails_at {
                run.step().unwrap();
            }
            let error = run.step().expect_err(fault).to_string();
            assert!(says.iter().all(|word| error.contains(word)), "{fault}: {error}");
            let error = run.step().unwrap_err().to_string();
            assert!(error.contains("start again"), "{fault}: {error}");
            e.configure("fail=none");
            e.reset();
            // Nothing is left behind that would stop another try.
            let mut fresh = tiny.run();
            tiny.start(&mut run);
            for _ in 0..3 {
                run.step().unwrap();
                fresh.step().unwrap();
            }
            assert_eq!(run.state().unwrap(), fresh.state().unwrap(), "{fault}");
        }
    });
}

/// What an observer hears of evaluations.
struct Steps(Vec<(usize, usize)>);

impl Observer for Steps {
    fn step(&mut self, done: usize, of: usize) -> ldm::Result<()> {
        self.0.push((done, of));
        Ok(())
    }
}

#[test]
fn pictures_replay_evaluations_and_decoder_and_every_evaluation_is_heard_of() {
    common::on_cuda_with(&common::SCHEDULES[..1], |device| {
        let folder = ModelFolder::open(model()).unwrap();
        let pipeline = Pipeline::open(&folder, device, Some(DType::F32)).unwrap();
        let size = Some(32);
        let request = Request {
            prompt: "x".into(),
            width: size,
            height: size,
            steps: 10,
            batch: 3,
            ..Default::default()
        };
        let (mut steps, before) = (Steps(vec![]), emulator().map(|e| asked(&e)));
        let pictures = pipeline.generate(&request, &mut steps).unwrap();
        let of = steps.0.len();
        assert_eq!(steps.0, (1..=of).map(|k| (k, of)).collect::<Vec<_>>());
        if let (Some(before), Some(e)) = (before, emulator()) {
            assert_eq!(asked(&e).graphs - before.graphs, (of - 1 + pictures.len() - 1) as u64);
        }
        let alone = Request { batch: 1, seed: request.seed + 1, ..request };
        let alone = pipeline.generate(&alone, &mut ()).unwrap();
        let off = pictures[1].rgb.iter().zip(&alone[0].rgb).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(off <= Some(1), "a picture of a batch is that of its seed; off by {off:?}");
    });
}

#[test]
fn a_program_without_states_replays_with_the_inputs_of_each_run() {
    common::on_cuda(|device| {
        let mut g = Graph::new();
        let x = g.input("x", DType::F32, [3, 40]);
        let y = g.push("silu", Activation(Act::Silu), &[x]).unwrap();
        let y = g.push("sum", Add, &[y, x]).unwrap();
        g.output("y", y);
        let make = || Program::new(g.clone(), &Weights::new(device), device).unwrap();
        let (mut program, mut watched) = (make(), make());
        for seed in 0..4 {
            for program in [&mut program, &mut watched] {
                program.write("x", &random(&[3, 40], seed)).unwrap();
            }
            program.run(&mut ()).unwrap();
            watched.run(&mut Watch(vec![])).unwrap();
            assert_eq!(program.read("y").unwrap(), watched.read("y").unwrap());
            assert_eq!(program.launches(), (seed > 0).then_some(2));
        }
    });
}

/// A sum of a weight's SiLU, of which x is no part, and x.
fn what_weights_alone_make_is_made_once(device: &Device) {
    let (mut g, mut weights) = (Graph::new(), Weights::new(device));
    weights.insert("w", &random(&[3, 40], 9)).unwrap();
    let w = g.weight("w", Layout::Same, DType::F32, [3, 40]).unwrap();
    let x = g.input("x", DType::F32, [3, 40]);
    let once = g.push("once", Activation(Act::Silu), &[w]).unwrap();
    // Of the same size as `once`, and dead before y: memory that `once` must not be given.
    let passing = g.push("passing", Activation(Act::Silu), &[x]).unwrap();
    let y = g.push("passed", Add, &[passing, x]).unwrap();
    let y = g.push("sum", Add, &[y, once]).unwrap();
    g.output("y", y);
    let make = || Program::new(g.clone(), &weights, device).unwrap();
    let (mut program, mut watched) = (make(), make());
    for run in 0..4 {
        for program in [&mut program, &mut watched] {
            program.write("x", &random(&[3, 40], run)).unwrap();
        }
        let mut watch = Watch(vec![]);
        if run == 3 {
            watched.unsettle();
        }
        program.run(&mut ()).unwrap();
        watched.run(&mut watch).unwrap();
        assert_eq!(watch.0.contains(&"once".to_string()), run == 0 || run == 3, "run {run}: {:?}", watch.0);
        let fresh = {
            let mut fresh = make();
            fresh.write("x", &random(&[3, 40], run)).unwrap();
            fresh.run(&mut ()).unwrap();
            fresh.read("y").unwrap()
        };
        assert_eq!(program.read("y").unwrap(), fresh);
        assert_eq!(watched.read("y").unwrap(), fresh);
        let replays = matches!(device, Device::Cuda(_)) && run > 0;
        assert_eq!(program.launches(), replays.then_some(3), "run {run}");
    }
}

/// What is made once may be read by what is made for each input alone: it stays there for the next input.
fn what_is_made_once_stays_for_what_an_input_makes(device: &Device) {
    let (mut g, mut weights) = (Graph::new(), Weights::new(device));
    weights.insert("w", &random(&[120], 9)).unwrap();
    let w = g.weight("w", Layout::Same, DType::F32, [120]).unwrap();
    let p = g.input("p", DType::F32, [120]);
    let s = g.state("s", DType::F32, [120]);
    let once = g.push("once", Activation(Act::Silu), &[w]).unwrap();
    let per_input = g.push("per_input", Add, &[once, p]).unwrap();
    let passing = g.push("passing", Activation(Act::Silu), &[s]).unwrap();
    let value = g.push("value", Add, &[passing, per_input]).unwrap();
    let next = g.push("next", Running { momentum: 0.5, factor: 1.0 }, &[s, value]).unwrap();
    g.update(s, next);
    let make = || Program::new(g.clone(), &weights, device).unwrap();
    let mut program = make();
    for seed in 0..3 {
        program.write("p", &random(&[120], seed)).unwrap();
        program.write("s", &random(&[120], 20 + seed)).unwrap();
        let mut fresh = make();
        fresh.write("p", &random(&[120], seed)).unwrap();
        fresh.write("s", &random(&[120], 20 + seed)).unwrap();
        program.run(&mut ()).unwrap();
        fresh.run(&mut ()).unwrap();
        assert_eq!(program.read("s").unwrap(), fresh.read("s").unwrap(), "input {seed}");
    }
}

#[test]
fn what_weights_alone_make_is_made_once_on_a_cpu() {
    what_weights_alone_make_is_made_once(&Device::Cpu);
    what_is_made_once_stays_for_what_an_input_makes(&Device::Cpu);
}

#[test]
fn what_weights_alone_make_is_made_once_on_a_gpu() {
    common::on_cuda(|device| {
        what_weights_alone_make_is_made_once(device);
        what_is_made_once_stays_for_what_an_input_makes(device);
    });
}

#[test]
fn counters_are_zero_and_the_same_for_all() {
    common::on_cuda(|device| {
        let Device::Cuda(cuda) = device else { panic!("a CUDA device") };
        let spec = Spec::new(DType::F32, [COUNTERS]);
        let sum = cuda.alloc(spec.bytes()).unwrap();
        let operand = |ptr| Operand { spec, ptr };
        let y = [operand(sum.ptr())];
        let call =
            |x| Call { device: cuda, node: "add", x, y: &y, scratch: Default::default(), scratch_bytes: 0 };
        let counters = call(&[]).counters().unwrap();
        assert_eq!(call(&[]).counters().unwrap(), counters);
        Op::from(Add).cuda(&call(&[operand(counters), operand(counters)])).unwrap();
        let mut bytes = vec![1; spec.bytes()];
        cuda.download(&sum, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0));
    });
}

/// Where a process of this test leaves what it has found.
const FOUND: &str = "LDM_TEST_FOUND";

/// Programmatic launches so far, on the emulator.
fn programmatic() -> u64 {
    emulator().map_or(0, |e| e.count("programmatic"))
}

/// Bytes of an evaluation node by node, of four recorded ones, and of a picture; and how many kernels a recording holds, with how
/// many of them may start before the one before them ends.
fn overlapped(device: &Device) -> String {
    let (tiny, before) = (Tiny::on(device, 6), programmatic());
    let mut run = tiny.run();
    run.step().unwrap();
    let alone = (run.state().unwrap().to_f32(), programmatic() - before);
    let before = emulator().map_or(0, |e| e.count("launch"));
    let first = programmatic();
    run.step().unwrap();
    let recorded = (emulator().map_or(0, |e| e.count("launch")) - before, programmatic() - first);
    (0..3).for_each(|_| assert!(run.step().unwrap()));
    let replayed = run.state().unwrap().to_f32();
    let folder = ModelFolder::open(model()).unwrap();
    let pipeline = Pipeline::open(&folder, device, Some(DType::BF16)).unwrap();
    let size = Some(32);
    let request = Request { prompt: "x".into(), width: size, height: size, steps: 4, ..Default::default() };
    let picture = pipeline.generate(&request, &mut ()).unwrap().remove(0).rgb;
    let bits = |x: &[f32]| x.iter().map(|v| format!("{:08x}", v.to_bits())).collect::<String>();
    let bytes = [bits(&alone.0), bits(&replayed), format!("{picture:02x?}")].join("\n");
    format!("{} {} {}\n{bytes}", alone.1, recorded.0, recorded.1)
}

/// A whole picture in bf16, in which products are joined: keys and values, embeddings, queries of the text encoder.
#[test]
fn a_picture_in_16_bits_is_that_of_the_cpu() {
    let folder = ModelFolder::open(model()).unwrap();
    let size = Some(32);
    let request = Request { prompt: "x".into(), width: size, height: size, steps: 4, ..Default::default() };
    let picture = |device: &Device| {
        let pipeline = Pipeline::open(&folder, device, Some(DType::BF16)).unwrap();
        pipeline.generate(&request, &mut ()).unwrap().remove(0).rgb
    };
    let want = picture(&Device::Cpu);
    let check = |device: &Device| {
        let got = picture(device);
        let most = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        let sum: f64 = got.iter().zip(&want).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
        let psnr = 10.0 * (255.0f64.powi(2) * want.len() as f64 / sum.max(1e-9)).log10();
        println!("at most {most} of 255, {psnr:.1} dB");
        // Of random weights: what bf16 itself leaves, with products joined or apart.
        assert!(got.len() == want.len() && most <= 24 && psnr > 38.0, "{most} of 255, {psnr:.1} dB");
    };
    common::on_cuda(check);
    // By warps, as on all cards but Hopper.
    common::on_cuda_with(&common::SCHEDULES[..1], |device| match device {
        Device::Cuda(cuda) => check(&Device::Cuda(cuda.with_wgmma(Wgmma::Off))),
        Device::Cpu => unreachable!("the CPU's picture is compared with"),
    });
}

/// `LDM_CUDA_OVERLAP` changes when kernels start, and nothing that they compute.
#[test]
fn kernels_that_start_early_give_the_same_bytes() {
    if let Some(file) = std::env::var_os(FOUND) {
        let last = std::cell::RefCell::new(String::new());
        common::on_cuda_with(&common::SCHEDULES[1..], |device| {
            let found = overlapped(device);
            assert!(last.borrow().is_empty() || *last.borrow() == found, "schedules differ");
            last.replace(found);
        });
        return std::fs::write(file, last.into_inner()).unwrap();
    }
    let of = |switch: &str| {
        let file = std::env::temp_dir().join(format!("ldm-replay-{}-{switch}", std::process::id()));
        let name = "kernels_that_start_early_give_the_same_bytes";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let child = child.args(["--exact", name, "--nocapture"]);
        let out = child.env(FOUND, &file).env("LDM_CUDA_OVERLAP", switch).output().unwrap();
        let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        let _ = std::fs::remove_file(&file);
        (out.status.success(), found, said)
    };
    let [off, on] = ["off", "on"].map(|switch| {
        let (good, found, said) = of(switch);
        assert!(good, "{switch}: {said}");
        found
    });
    let (Some((off, bytes)), Some((on, same))) = (off.split_once('\n'), on.split_once('\n')) else {
        return common::skipped("no emulator");
    };
    assert!(bytes == same && bytes.len() > 1000, "{bytes}\n{same}");
    let (good, _, said) = of("maybe");
    assert!(!good && said.contains("LDM_CUDA_OVERLAP: want on or off; got `maybe`"), "{said}");
    if emulator().is_some() {
        let counts = |line: &str| line.split(' ').map(|n| n.parse().unwrap()).collect::<Vec<u64>>();
        let (off, on) = (counts(off), counts(on));
        assert_eq!((off[0], off[2], off[1]), (0, 0, on[1]));
        assert_eq!(on[2], on[1] - 1, "all but the first of a recording: {on:?}");
    }
}
