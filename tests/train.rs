//! Whole models beside PyTorch: gradients of every parameter, and the losses of a hundred steps of AdamW.

mod common;

use common::on_cuda_with;
use ldm::backend::Device;
use ldm::exec::{Program, Target, Weights};
use ldm::graph::{Graph, Layout, Parameter, Var, gradients};
use ldm::io::{Checkpoint, Config};
use ldm::models::{AutoencoderKL, Model, UNet2D, UNet2DCondition};
use ldm::nn::add;
use ldm::ops::{Distance, Gaussian, Kl, Loss, cast};
use ldm::tensor::{DType, HostTensor, Spec};
use ldm::train::{Noised, Optimiser, Trainer, blocks, diffusion_loss, update};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A model with its loss, its recorded inputs and what PyTorch made of them.
struct Subject {
    record: Checkpoint,
    weights: Checkpoint,
    /// Inputs that the record holds `sets` times.
    inputs: Vec<&'static str>,
    graph: Graph,
    loss: Var,
}

const SETS: usize = 4;

fn record(name: &str) -> Checkpoint {
    Checkpoint::open(golden(&format!("train/{name}.safetensors"))).unwrap()
}

/// Set k of an input of the record.
fn set(record: &Checkpoint, name: &str, k: usize) -> HostTensor {
    let all = record.read(name, DType::F32).unwrap();
    let shape = &all.shape()[1..];
    let n: usize = shape.iter().product();
    HostTensor::f32(shape, all.to_f32()[k * n..(k + 1) * n].to_vec()).unwrap()
}

fn unet() -> Subject {
    unet_in(DType::F32)
}

fn unet_in(dtype: DType) -> Subject {
    unet_of("sd15-tiny", "unet", dtype)
}

/// A mask and the latents of a masked picture beside the noisy ones.
fn inpainting() -> Subject {
    unet_of("inpaint-tiny", "inpainting", DType::F32)
}

fn unet_of(folder: &str, name: &str, dtype: DType) -> Subject {
    let config = Config::read(golden(&format!("{folder}/unet/config.json"))).unwrap();
    let model = UNet2DCondition::from_config(&config).unwrap();
    let record = record(name);
    let mut g = Graph::new();
    g.train(true);
    let input = |g: &mut Graph, name: &str| g.input(name, DType::F32, set(&record, name, 0).shape());
    let [x, t, context, target] = ["x", "t", "context", "target"].map(|name| input(&mut g, name));
    let weights = g.input("weights", DType::F32, [2]);
    let [x, context] = [x, context].map(|v| cast(&mut g, "cast", v, dtype, 1.0).unwrap());
    let y = model.build(&mut g, x, (t, None), context).unwrap();
    let loss = g.push("loss", Loss(Distance::L2), &[y, target, weights]).unwrap();
    let weights = Checkpoint::open(golden(&format!("{folder}/unet"))).unwrap();
    Subject { record, weights, inputs: vec!["x", "t", "context", "target"], graph: g, loss }
}

fn unet_2d() -> Subject {
    let model = UNet2D::from_config(&Config::read(golden("uncond-tiny/unet/config.json")).unwrap()).unwrap();
    let record = record("unet_2d");
    let mut g = Graph::new();
    g.train(true);
    let [x, t, target] =
        ["x", "t", "target"].map(|name| g.input(name, DType::F32, set(&record, name, 0).shape()));
    let weights = g.input("weights", DType::F32, [2]);
    let y = model.build(&mut g, x, (t, None)).unwrap();
    let loss = g.push("loss", Loss(Distance::Huber(0.5)), &[y, target, weights]).unwrap();
    let weights = Checkpoint::open(golden("uncond-tiny/unet")).unwrap();
    Subject { record, weights, inputs: vec!["x", "t", "target"], graph: g, loss }
}

fn kl() -> Subject {
    let config = Config::read(golden("sd15-tiny/vae/config.json")).unwrap();
    let model = AutoencoderKL::from_config(&config).unwrap();
    let record = record("kl");
    let mut g = Graph::new();
    g.train(true);
    let [x, noise] = ["x", "noise"].map(|name| g.input(name, DType::F32, set(&record, name, 0).shape()));
    let weights = g.input("weights", DType::F32, [2]);
    let moments = model.encode(&mut g, x).unwrap();
    let z = g.push("draw", Gaussian { scale: 1.0 }, &[moments, noise]).unwrap();
    let y = model.decode(&mut g, z).unwrap();
    let distance = g.push("distance", Loss(Distance::L1), &[y, x, weights]).unwrap();
    let divergence = g.push("kl", Kl, &[moments]).unwrap();
    let divergence = cast(&mut g, "kl.weighted", divergence, DType::F32, 1e-4).unwrap();
    let loss = add(&mut g, "loss", distance, divergence).unwrap();
    let weights = Checkpoint::open(golden("sd15-tiny/vae")).unwrap();
    Subject { record, weights, inputs: vec!["x", "noise"], graph: g, loss }
}

/// A parameter of the checkpoint in the axes of the engine.
fn held(weights: &Checkpoint, p: &Parameter, spec: Spec) -> HostTensor {
    let x = weights.read(&p.name, DType::F32).unwrap();
    let x = if p.layout == Layout::Conv { x.permute(&[0, 2, 3, 1]).unwrap() } else { x };
    x.reshape(spec.shape).unwrap()
}

/// Norms of PyTorch's gradients: of one parameter, and of all together.
fn norm(record: &Checkpoint, p: &Parameter) -> f64 {
    record.read(&format!("norm.{}", p.name), DType::F32).unwrap().to_f64()[0]
}

/// Relative distance from what is recorded of a gradient. `floor` is added to its size: where a norm follows that takes out
/// what a parameter adds, such as a bias in front of groups of one channel, the gradient is zero but for rounding.
fn distance(record: &Checkpoint, p: &Parameter, grad: HostTensor, floor: f64) -> f64 {
    let grad = if p.layout == Layout::Conv { grad.permute(&[0, 3, 1, 2]).unwrap() } else { grad };
    let ours = grad.to_f64();
    let theirs = record.read(&format!("grad.{}", p.name), DType::F32).unwrap().to_f64();
    let n = ours.len();
    let at = |i: usize| if n > theirs.len() { i * 7919 % n } else { i };
    let square = |f: &dyn Fn(usize) -> f64| (0..theirs.len()).map(|i| f(i) * f(i)).sum::<f64>().sqrt();
    let (off, size) = (square(&|i| ours[at(i)] - theirs[i]), square(&|i| theirs[i]));
    let all = ours.iter().map(|v| v * v).sum::<f64>().sqrt();
    let norm = norm(record, p);
    (off / (size + floor)).max((all - norm).abs() / (norm + floor))
}

/// Gradients of every parameter on a device.
fn check_gradients(subject: fn() -> Subject, device: &Device, bound: f64) {
    let Subject { record, weights, inputs, graph: mut g, loss } = subject();
    let one = g.input("one", DType::F32, [1]);
    let parameters = g.parameters().to_vec();
    let used: Vec<Var> = parameters.iter().map(|p| p.used).collect();
    let found = gradients(&mut g, &[(loss, one)], &used, &[]).unwrap();
    for (p, d) in parameters.iter().zip(&found) {
        g.output(&format!("grad.{}", p.name), d.unwrap_or_else(|| panic!("{}: no gradient", p.name)));
    }
    g.output("loss", loss);
    let states: Vec<Spec> = parameters.iter().map(|p| g.spec(p.state)).collect();
    let mut program = Program::new(g, &Weights::new(device), device).unwrap();
    for (p, &spec) in parameters.iter().zip(&states) {
        program.write(&p.name, &held(&weights, p, spec)).unwrap();
    }
    for name in inputs {
        program.write(name, &set(&record, name, 0)).unwrap();
    }
    program.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    program.write("one", &HostTensor::f32([1], vec![1.0]).unwrap()).unwrap();
    program.run(&mut ()).unwrap();
    let (ours, theirs) =
        (program.read("loss").unwrap().to_f64()[0], record.read("loss", DType::F32).unwrap().to_f64()[0]);
    assert!((ours - theirs).abs() <= 1e-5 * theirs, "loss: {ours}, PyTorch {theirs}");
    let total = parameters.iter().map(|p| norm(&record, p).powi(2)).sum::<f64>().sqrt();
    let mut worst = (0.0, String::new());
    for p in &parameters {
        let off = distance(&record, p, program.read(&format!("grad.{}", p.name)).unwrap(), 1e-3 * total);
        let size = norm(&record, p);
        assert!(off <= bound, "{}: off by {off:e} of {size:e}, want at most {bound:e}", p.name);
        if off > worst.0 {
            worst = (off, p.name.clone());
        }
    }
    println!("{} parameters; worst {:e} at {}", parameters.len(), worst.0, worst.1);
}

#[test]
fn gradients_of_a_unet() {
    check_gradients(unet, &Device::Cpu, 1e-4);
}

#[test]
fn gradients_of_an_inpainting_unet() {
    check_gradients(inpainting, &Device::Cpu, 1e-4);
}

#[test]
fn gradients_of_a_unet_without_a_condition() {
    check_gradients(unet_2d, &Device::Cpu, 1e-4);
}

#[test]
fn gradients_of_an_autoencoder() {
    check_gradients(kl, &Device::Cpu, 1e-4);
}

#[test]
fn gradients_on_cuda() {
    on_cuda_with(&["order=forward;async=late"], |device| {
        check_gradients(unet, device, 1e-4);
        check_gradients(inpainting, device, 1e-4);
        check_gradients(unet_2d, device, 1e-4);
        check_gradients(kl, device, 1e-4);
    });
}

/// Steps in a 16-bit type with f32 weights: the losses are those of f32 within 3 %.
fn check_mixed(dtype: DType, device: &Device, steps: usize) {
    let Subject { record, weights, inputs, graph: mut g, loss } = unet_in(dtype);
    let how = Optimiser { loss_scale: dtype == DType::F16, ..Optimiser::default() };
    update(&mut g, loss, &how, &[]).unwrap();
    let parameters = g.parameters().to_vec();
    let mut trainer = Trainer::new(g, &how, &Weights::new(device), device).unwrap();
    for (p, (name, shape)) in parameters.iter().zip(trainer.parameters()) {
        trainer.set(&name, &held(&weights, p, Spec::new(DType::F32, shape))).unwrap();
    }
    trainer.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    let rate = record.metadata()["rate"].parse::<f64>().unwrap();
    let theirs = record.read("curve", DType::F32).unwrap().to_f64();
    if dtype == DType::F16 {
        // A loss so heavy that its gradients overflow: the step is left out, and only the scale changes.
        for name in &inputs {
            trainer.write(name, &set(&record, name, 0)).unwrap();
        }
        trainer.write("weights", &HostTensor::f32([2], vec![1e5; 2]).unwrap()).unwrap();
        let before = trainer.states().unwrap();
        assert!(trainer.step(rate, 0.0).unwrap().skipped && trainer.steps() == 0);
        let after = trainer.states().unwrap();
        let changed: Vec<_> = before.iter().zip(&after).filter(|(a, b)| a != b).map(|(a, _)| &a.0).collect();
        assert_eq!(changed, ["loss_scale"]);
        trainer.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    }
    let mut left_out = 0;
    while trainer.steps() < steps {
        let step = trainer.steps();
        for name in &inputs {
            trainer.write(name, &set(&record, name, step % SETS)).unwrap();
        }
        let report = trainer.step(rate, 0.0).unwrap();
        left_out += report.skipped as usize;
        let off = (f64::from(report.loss) - theirs[step]).abs() / theirs[step];
        assert!(
            off <= 0.03,
            "{dtype}, step {step}: a loss of {}, PyTorch in f32 {}",
            report.loss,
            theirs[step]
        );
        assert!(left_out < 10, "{dtype}: {left_out} steps left out for gradients that are not finite");
    }
    println!("{dtype}: {left_out} steps left out");
}

#[test]
fn mixed_precision() {
    check_mixed(DType::BF16, &Device::Cpu, 20);
    check_mixed(DType::F16, &Device::Cpu, 20);
}

#[test]
fn mixed_precision_on_cuda() {
    on_cuda_with(&["order=reverse;async=early"], |device| {
        check_mixed(DType::BF16, device, 2);
        check_mixed(DType::F16, device, 2);
    });
}

/// The losses of steps with AdamW from the same weights, inputs and noise as PyTorch's, within 1e-3, or three times what
/// PyTorch's own differ by between one and two threads, and between f32 and f64: rounding grows from step to step.
fn check_curve(subject: fn() -> Subject, device: &Device, steps: usize) {
    let Subject { record, weights, inputs, graph: mut g, loss } = subject();
    let how = Optimiser::default();
    update(&mut g, loss, &how, &[]).unwrap();
    let parameters = g.parameters().to_vec();
    let mut trainer = Trainer::new(g, &how, &Weights::new(device), device).unwrap();
    for (p, (name, shape)) in parameters.iter().zip(trainer.parameters()) {
        assert_eq!(p.name, name);
        trainer.set(&name, &held(&weights, p, Spec::new(DType::F32, shape))).unwrap();
    }
    trainer.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    let note = |key: &str| record.metadata()[key].parse::<f64>().unwrap();
    let theirs = record.read("curve", DType::F32).unwrap().to_f64();
    let bound = f64::max(1e-3, 3.0 * note("differs"));
    let mut worst: f64 = 0.0;
    for (step, want) in theirs.iter().take(steps).enumerate() {
        for name in &inputs {
            trainer.write(name, &set(&record, name, step % SETS)).unwrap();
        }
        let got = f64::from(trainer.step(note("rate"), 0.0).unwrap().loss);
        let off = (got - want).abs() / want.abs();
        assert!(
            off <= bound,
            "step {step}: a loss of {got}, PyTorch {want}: off by {off:e}, want at most {bound:e}"
        );
        worst = worst.max(off);
    }
    println!(
        "{steps} steps, losses {} to {}: worst {worst:e}, bound {bound:e}",
        theirs[0],
        theirs[steps - 1]
    );
}

#[test]
fn losses_of_a_unet() {
    check_curve(unet, &Device::Cpu, 100);
}

#[test]
fn losses_of_an_inpainting_unet() {
    check_curve(inpainting, &Device::Cpu, 100);
}

#[test]
fn losses_of_a_unet_without_a_condition() {
    check_curve(unet_2d, &Device::Cpu, 100);
}

#[test]
fn losses_of_an_autoencoder() {
    check_curve(kl, &Device::Cpu, 100);
}

/// A loss beyond all numbers whose gradients are finite, as Huber's are: the step fails, and no state has changed.
#[test]
fn a_loss_that_is_not_finite_updates_nothing() {
    let Subject { record, weights, inputs, graph: mut g, loss } = unet_2d();
    let how = Optimiser { average: true, ..Optimiser::default() };
    update(&mut g, loss, &how, &[]).unwrap();
    let parameters = g.parameters().to_vec();
    let mut trainer = Trainer::new(g, &how, &Weights::new(&Device::Cpu), &Device::Cpu).unwrap();
    for (p, (name, shape)) in parameters.iter().zip(trainer.parameters()) {
        trainer.set(&name, &held(&weights, p, Spec::new(DType::F32, shape))).unwrap();
    }
    for name in inputs {
        trainer.write(name, &set(&record, name, 0)).unwrap();
    }
    trainer.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    let target = set(&record, "target", 0);
    let mut beyond = target.to_f32();
    beyond[7] = f32::INFINITY;
    trainer.write("target", &HostTensor::f32(target.shape(), beyond).unwrap()).unwrap();
    let before = trainer.states().unwrap();
    let e = trainer.step(1e-3, 0.5).unwrap_err().to_string();
    assert!(e.contains("a loss of inf") && !e.contains("norm inf") && !e.contains("norm NaN"), "{e}");
    assert!(trainer.states().unwrap() == before);
    trainer.write("target", &target).unwrap();
    trainer.step(1e-3, 0.5).unwrap();
    assert!(trainer.states().unwrap() != before);
}

/// The first step of the small UNet with its blocks kept, and made again: the bytes of the arena, and all weights after it.
fn first_step(again: bool) -> (usize, Vec<(String, HostTensor)>) {
    let Subject { record, weights, inputs, graph: mut g, loss } = unet();
    let blocks = if again { blocks(&g) } else { vec![] };
    assert!(!again || blocks.len() > 8, "{blocks:?}");
    let how = Optimiser { average: true, ..Optimiser::default() };
    update(&mut g, loss, &how, &blocks).unwrap();
    let parameters = g.parameters().to_vec();
    let mut trainer = Trainer::new(g, &how, &Weights::new(&Device::Cpu), &Device::Cpu).unwrap();
    for (p, (name, shape)) in parameters.iter().zip(trainer.parameters()) {
        trainer.set(&name, &held(&weights, p, Spec::new(DType::F32, shape))).unwrap();
    }
    for name in inputs {
        trainer.write(name, &set(&record, name, 0)).unwrap();
    }
    trainer.write("weights", &HostTensor::f32([2], vec![1.0; 2]).unwrap()).unwrap();
    trainer.step(1e-3, 0.5).unwrap();
    (trainer.program().plan().arena, trainer.states().unwrap())
}

/// Weights are cast in the midst of blocks in a 16-bit type, and are called otherwise than the nodes in a graph of parts, as
/// `ldm train diffusion` has it.
#[test]
fn blocks_are_whole_in_every_type() {
    let config = Config::read(golden("sd15-tiny/unet/config.json")).unwrap();
    let model = UNet2DCondition::from_config(&config).unwrap();
    let planned = |dtype: DType, again: bool| {
        let mut g = Graph::new();
        g.train(true);
        let input = Noised {
            x: g.input("x", DType::F32, [4, 32, 32, 4]),
            t: g.input("t", DType::F32, [4]),
            condition: Some(g.input("context", DType::F32, [4, 77, 32])),
            target: g.input("target", DType::F32, [4, 32, 32, 4]),
            weights: g.input("weights", DType::F32, [4]),
        };
        let loss = diffusion_loss(&mut g, (&model, None), input, Distance::L2, dtype).unwrap();
        let blocks = blocks(&g);
        update(&mut g, loss, &Optimiser::default(), if again { &blocks } else { &[] }).unwrap();
        (blocks.len(), Program::measure(&g, Target::Cuda).unwrap().arena)
    };
    for dtype in [DType::F32, DType::BF16] {
        let ((blocks, kept), (_, again)) = (planned(dtype, false), planned(dtype, true));
        println!(
            "{dtype}: {blocks} blocks, arena: {kept} bytes with all kept, {again} with blocks made again"
        );
        // Residual blocks: two on each level down, three up, two in the middle; transformers: two, three, and one.
        assert_eq!(blocks, 4 + 6 + 2 + 2 + 3 + 1, "{dtype}");
        assert!(
            again * 10 < kept * 8,
            "{dtype}: arena: {kept} bytes with all kept, {again} with blocks made again"
        );
    }
}

#[test]
fn blocks_that_are_made_again_take_less_memory_and_change_no_bit() {
    let ((kept, a), (again, b)) = (first_step(false), first_step(true));
    assert!(again * 10 < kept * 8, "arena: {kept} bytes with all kept, {again} with blocks made again");
    assert!(a == b, "weights, moments or averages differ");
    println!("arena: {kept} bytes with all kept, {again} with blocks made again");
}
