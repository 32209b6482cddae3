//! First stages beside PyTorch: gradients of the autoencoder and of its discriminator, each with respect to its own parameters,
//! and the losses of steps that update both.

mod common;

use common::on_cuda_with;
use ldm::backend::Device;
use ldm::exec::{Program, Weights};
use ldm::graph::{Graph, Layout, Parameter};
use ldm::io::{Checkpoint, Config};
use ldm::models::{AutoencoderKL, Lpips, Model, NLayerDiscriminator, PatchNorm, VQModel};
use ldm::pipeline::Vae;
use ldm::tensor::{DType, HostTensor, Shape};
use ldm::train::{
    Adversary, Codebook, FirstStageLoss, Gan, Optimiser, PerceptualTerm, Trainer, initial_discriminator,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// What PyTorch recorded of a model, the model, and its losses.
struct Subject {
    record: Checkpoint,
    weights: Checkpoint,
    vae: Vae,
    loss: FirstStageLoss,
    /// It sees what the recorded steps see: pictures of 2×2 squares of −1 or 1, and a quarter of the noise.
    steps: bool,
}

fn adversary(kind: Gan, weight: f64) -> Option<Adversary> {
    let model = NLayerDiscriminator { in_channels: 3, width: 4, layers: 2, norm: PatchNorm::Batch };
    Some(Adversary { model, kind, weight, factor: 1.0, start: 0 })
}

fn kl() -> Subject {
    let folder = golden("sd15-tiny/vae");
    let model = AutoencoderKL::from_config(&Config::read(folder.join("config.json")).unwrap()).unwrap();
    Subject {
        record: Checkpoint::open(golden("train/kl-hinge.safetensors")).unwrap(),
        weights: Checkpoint::open(folder).unwrap(),
        vae: Vae::Kl(model),
        loss: FirstStageLoss { adversary: adversary(Gan::Hinge, 0.5), ..FirstStageLoss::default() },
        steps: false,
    }
}

fn vq(record: &str, kind: Gan, legacy: bool) -> Subject {
    let folder = golden("vq4-tiny/vqvae");
    let model = VQModel::from_config(&Config::read(folder.join("config.json")).unwrap()).unwrap();
    Subject {
        record: Checkpoint::open(golden(&format!("train/{record}.safetensors"))).unwrap(),
        weights: Checkpoint::open(folder).unwrap(),
        vae: Vae::Vq(model),
        loss: FirstStageLoss {
            adversary: adversary(kind, 0.8),
            codebook: Codebook { weight: 1.0, beta: 0.25, legacy },
            ..FirstStageLoss::default()
        },
        steps: false,
    }
}

fn vq_vanilla() -> Subject {
    vq("vq-vanilla", Gan::Vanilla, true)
}

/// With norms that start with their first batch.
fn vq_actnorm() -> Subject {
    let mut subject = vq("vq-actnorm", Gan::Vanilla, true);
    subject.loss.adversary.as_mut().unwrap().model.norm = PatchNorm::Act;
    subject
}

/// With a perceptual term.
fn vq_hinge() -> Subject {
    let mut subject = vq("vq-hinge", Gan::Hinge, false);
    let model = Lpips { channels: [4, 4, 8, 8, 8] };
    subject.loss.perceptual = Some(PerceptualTerm { model, weight: 0.7 });
    subject
}

impl Subject {
    fn read(&self, name: &str) -> HostTensor {
        self.record.read(name, DType::F32).unwrap()
    }

    /// An input (B,H,W,C) of the losses.
    fn seen(&self, name: &str) -> HostTensor {
        let x = self.read(name);
        if !self.steps {
            return x;
        }
        let (shape, values) = (x.shape(), x.to_f32());
        let [b, h, w, c] = [shape[0], shape[1], shape[2], shape[3]];
        let square = |i: usize| if name == "x" { i / 8 * 8 } else { i };
        let mut seen = vec![];
        for i in 0..b * (h / 2) * (w / 2) * c {
            let (image, row, column) =
                (i / c / (w / 2) / (h / 2), i / c / (w / 2) % (h / 2), i / c % (w / 2));
            let v = values[((image * h + square(row)) * w + square(column)) * c + i % c];
            seen.push(if name != "x" {
                v
            } else if v < 0.0 {
                -1.0
            } else {
                1.0
            });
        }
        HostTensor::f32([b, h / 2, w / 2, c], seen).unwrap()
    }

    fn number(&self, name: &str) -> f64 {
        self.read(name).to_f64()[0]
    }

    /// A graph that trains, with its picture.
    fn graph(&self) -> (Graph, ldm::graph::Var) {
        let mut g = Graph::new();
        g.train(true);
        let image = g.input("image", DType::F32, self.seen("x").shape());
        (g, image)
    }

    /// The inputs of the losses.
    fn inputs(&self) -> Vec<(&'static str, HostTensor)> {
        let batch = self.read("x").shape()[0];
        let mut all = vec![
            ("image", self.seen("x")),
            ("weights", HostTensor::f32([batch], vec![1.0; batch]).unwrap()),
            ("discriminator.factor", HostTensor::f32([1], vec![1.0]).unwrap()),
        ];
        all.extend(matches!(self.vae, Vae::Kl(_)).then(|| ("noise", self.seen("noise"))));
        all
    }

    /// The first value of a parameter, in the axes of the engine.
    fn held(&self, name: &str, layout: Layout, shape: Shape) -> HostTensor {
        let x = match name.strip_prefix("discriminator.") {
            // Verdicts as small as at the start of a run.
            Some(own @ "main.8.weight") if self.steps => {
                let x = self.read(&format!("start.{own}"));
                HostTensor::f32(x.shape(), x.to_f32().iter().map(|v| 0.125 * v).collect()).unwrap()
            }
            Some(own) => self.read(&format!("start.{own}")),
            None => self.weights.read(name, DType::F32).unwrap(),
        };
        let x = if layout == Layout::Conv { x.permute(&[0, 2, 3, 1]).unwrap() } else { x };
        x.reshape(shape).unwrap()
    }

    /// Relative distance from what is recorded of a gradient, `floor` added to its size: where a norm follows that takes out
    /// what a parameter adds, the gradient is zero but for rounding.
    fn distance(&self, p: &Parameter, grad: HostTensor, floor: f64) -> f64 {
        let grad = if p.layout == Layout::Conv { grad.permute(&[0, 3, 1, 2]).unwrap() } else { grad };
        let (ours, theirs) = (grad.to_f64(), self.read(&format!("grad.{}", p.name)).to_f64());
        let n = ours.len();
        let at = |i: usize| if n > theirs.len() { i * 7919 % n } else { i };
        let square = |f: &dyn Fn(usize) -> f64| (0..theirs.len()).map(|i| f(i) * f(i)).sum::<f64>().sqrt();
        let (off, size) = (square(&|i| ours[at(i)] - theirs[i]), square(&|i| theirs[i]));
        let (all, norm) =
            (ours.iter().map(|v| v * v).sum::<f64>().sqrt(), self.number(&format!("norm.{}", p.name)));
        (off / (size + floor)).max((all - norm).abs() / (norm + floor))
    }
}

fn near(what: &str, ours: f64, theirs: f64, bound: f64) {
    let off = (ours - theirs).abs() / theirs.abs();
    assert!(off <= bound, "{what}: {ours}, PyTorch {theirs}: off by {off:e}, want at most {bound:e}");
}

/// Gradients of both sides, the losses and the adaptive weight.
fn check_gradients(subject: fn() -> Subject, device: &Device) {
    let subject = subject();
    let (mut g, image) = subject.graph();
    let scale = g.input("scale", DType::F32, [1]);
    let sides = subject.loss.gradients(&mut g, &subject.vae, image, (DType::F32, false), scale).unwrap();
    let (mut all, mut names) = (vec![], BTreeSet::new());
    for side in &sides {
        for (p, d) in side.parameters.iter().zip(&side.gradients) {
            assert_eq!(p.name.starts_with("discriminator."), !side.at.is_empty(), "{}", p.name);
            g.output(&format!("grad.{}", p.name), d.unwrap_or_else(|| panic!("{}: no gradient", p.name)));
            all.push((p.clone(), g.shape(p.state), side.at));
            names.insert(p.name.clone());
        }
    }
    let recorded = subject.record.names().filter_map(|n| n.strip_prefix("norm.").map(String::from));
    assert_eq!(names, recorded.collect::<BTreeSet<_>>());
    let mut frozen = Weights::new(device);
    if let Some(term) = &subject.loss.perceptual {
        term.load(&subject.record, DType::F32, &mut frozen).unwrap();
    }
    let mut program = Program::new(g, &frozen, device).unwrap();
    for (p, shape, _) in &all {
        program.write(&p.name, &subject.held(&p.name, p.layout, *shape)).unwrap();
    }
    for (name, value) in subject.inputs() {
        program.write(name, &value).unwrap();
    }
    program.write("scale", &HostTensor::f32([1], vec![1.0]).unwrap()).unwrap();
    program.run(&mut ()).unwrap();
    for name in ["loss", "discriminator.loss", "adaptive_weight"] {
        near(name, program.read(name).unwrap().to_f64()[0], subject.number(name), 2e-5);
    }
    for side in &sides {
        let own = || all.iter().filter(|(_, _, at)| *at == side.at).map(|(p, ..)| p);
        let norm = |p: &Parameter| subject.number(&format!("norm.{}", p.name));
        let total = own().map(|p| norm(p).powi(2)).sum::<f64>().sqrt();
        let mut worst = (0.0, String::new());
        for p in own() {
            let grad = program.read(&format!("grad.{}", p.name)).unwrap();
            let off = subject.distance(p, grad, 1e-3 * total);
            assert!(off <= 1e-4, "{}: off by {off:e} of {:e}, want at most 1e-4", p.name, norm(p));
            if off > worst.0 {
                worst = (off, p.name.clone());
            }
        }
        println!("{}{} parameters; worst {:e} at {}", side.at, own().count(), worst.0, worst.1);
    }
}

#[test]
fn gradients_of_kl_and_a_hinge_discriminator() {
    check_gradients(kl, &Device::Cpu);
}

#[test]
fn gradients_of_vq_legacy_and_a_vanilla_discriminator() {
    check_gradients(vq_vanilla, &Device::Cpu);
}

#[test]
fn gradients_of_vq_corrected_a_hinge_discriminator_and_a_perceptual_term() {
    check_gradients(vq_hinge, &Device::Cpu);
}

#[test]
fn gradients_of_vq_and_a_discriminator_with_actnorm() {
    check_gradients(vq_actnorm, &Device::Cpu);
}

#[test]
fn gradients_on_cuda() {
    on_cuda_with(&["order=forward;async=late"], |device| {
        [kl, vq_vanilla, vq_hinge, vq_actnorm].iter().for_each(|subject| check_gradients(*subject, device));
    });
}

/// Means in place of sums: the loss, the weight of the generator and every gradient are divided by the values of a picture.
#[test]
fn means_of_kl_are_sums_by_the_number_of_values() {
    let mut subject = kl();
    let x = subject.read("x").shape();
    let values = (x.numel() / x[0]) as f64;
    subject.loss.means = true;
    let (mut g, image) = subject.graph();
    let scale = g.input("scale", DType::F32, [1]);
    let sides = subject.loss.gradients(&mut g, &subject.vae, image, (DType::F32, false), scale).unwrap();
    let own: Vec<_> = sides[0].parameters.iter().zip(&sides[0].gradients).collect();
    own.iter().for_each(|(p, d)| g.output(&format!("grad.{}", p.name), d.unwrap()));
    let all: Vec<_> = g.parameters().iter().map(|p| (p.clone(), g.shape(p.state))).collect();
    let mut program = Program::new(g, &Weights::new(&Device::Cpu), &Device::Cpu).unwrap();
    for (p, shape) in &all {
        program.write(&p.name, &subject.held(&p.name, p.layout, *shape)).unwrap();
    }
    for (name, value) in subject.inputs() {
        program.write(name, &value).unwrap();
    }
    program.write("scale", &HostTensor::f32([1], vec![1.0]).unwrap()).unwrap();
    program.run(&mut ()).unwrap();
    for name in ["loss", "adaptive_weight"] {
        near(name, values * program.read(name).unwrap().to_f64()[0], subject.number(name), 2e-5);
    }
    let total =
        own.iter().map(|(p, _)| subject.number(&format!("norm.{}", p.name)).powi(2)).sum::<f64>().sqrt();
    for (p, _) in own {
        let grad = program.read(&format!("grad.{}", p.name)).unwrap();
        let times = grad.to_f32().iter().map(|v| (f64::from(*v) * values) as f32).collect();
        let off = subject.distance(p, HostTensor::f32(grad.shape(), times).unwrap(), 1e-3 * total);
        assert!(off <= 1e-4, "{}: off by {off:e}", p.name);
    }
}

fn how(subject: &Subject) -> Optimiser {
    let eps = subject.record.metadata()["eps"].parse().unwrap();
    Optimiser { eps, ..FirstStageLoss::optimiser() }
}

/// A trainer at the weights that PyTorch started from.
fn trainer(subject: &Subject, how: &Optimiser) -> Trainer {
    let (mut g, image) = subject.graph();
    subject.loss.step(&mut g, &subject.vae, image, (DType::F32, false), how).unwrap();
    let layouts: Vec<Layout> = g.parameters().iter().map(|p| p.layout).collect();
    let mut trainer = Trainer::new(g, how, &Weights::new(&Device::Cpu), &Device::Cpu).unwrap();
    for ((name, shape), layout) in trainer.parameters().into_iter().zip(layouts) {
        trainer.set(&name, &subject.held(&name, layout, shape)).unwrap();
    }
    for (name, value) in subject.inputs() {
        trainer.write(name, &value).unwrap();
    }
    subject.loss.begin(&mut trainer, subject.read("x").shape()[0]).unwrap();
    trainer
}

/// The losses of both sides over a hundred steps of Adam from PyTorch's weights, data and noise, and the running statistics
/// after them, within 1e-4, or three times what PyTorch's two threads differ from its one by. Rounding decides on which side of
/// a kink (L1, hinge, leaky ReLU, nearest code) a value is, and whole runs part there: see `tools/golden_train.py`, which has
/// looked for a start from which PyTorch's own runs stay together.
fn check_curve(subject: fn() -> Subject) {
    let subject = Subject { steps: true, ..subject() };
    let note = |key: &str| subject.record.metadata()[key].parse::<f64>().unwrap();
    let mut trainer = trainer(&subject, &how(&subject));
    let bound = f64::max(1e-4, 3.0 * note("threads"));
    let mut worst: f64 = 0.0;
    let curve = subject.read("curve").to_f64();
    assert_eq!(curve.len(), 2 * 100);
    for (step, theirs) in curve.chunks(2).enumerate() {
        subject.loss.at_step(&mut trainer).unwrap();
        let report = trainer.step(note("rate"), 0.0).unwrap();
        let ours = [f64::from(report.loss), trainer.read("discriminator.loss").unwrap().to_f64()[0]];
        for (which, (ours, theirs)) in ours.into_iter().zip(theirs).enumerate() {
            near(&format!("step {step}, loss {which}"), ours, *theirs, bound);
            worst = worst.max((ours - theirs).abs() / theirs.abs());
        }
    }
    let (first, last) = (&curve[..2], &curve[198..]);
    println!(
        "losses {first:?} to {last:?}: worst {worst:e}, bound {bound:e}; PyTorch's own {:?}",
        ["threads", "exact"].map(note)
    );
    assert!(last[0] < 0.7 * first[0], "the losses hardly move: {first:?} to {last:?}");
    let batch_norms = subject.loss.adversary.as_ref().is_some_and(|a| a.model.norm == PatchNorm::Batch);
    assert_eq!(trainer.others().len(), if batch_norms { 4 } else { 0 });
    for name in trainer.others() {
        let ours = trainer.read(name).unwrap().to_f64();
        let theirs = subject.read(&name.replace("discriminator.", "after.")).to_f64();
        let size = theirs.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let off = ours.iter().zip(&theirs).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(off <= bound * size, "{name}: off by {off:e} of {size:e}");
    }
}

#[test]
fn losses_of_kl() {
    check_curve(kl);
}

#[test]
fn losses_of_vq() {
    check_curve(vq_vanilla);
}

#[test]
fn losses_of_vq_with_actnorm() {
    check_curve(vq_actnorm);
}

/// Shifts and scales start as those that the first reconstruction asks for, layer by layer.
#[test]
fn actnorm_starts_with_the_first_batch_as_compvis_starts_it() {
    let subject = vq_actnorm();
    let mut trainer = trainer(&subject, &how(&subject));
    let norms = ["discriminator.main.3", "discriminator.main.6"];
    let names = norms.iter().flat_map(|norm| ["loc", "scale"].map(|kind| format!("{norm}.{kind}")));
    let names: Vec<String> = names.collect();
    for name in &names {
        let shape = trainer.read(name).unwrap().shape();
        let start = if name.ends_with("scale") { 1.0 } else { 0.0 };
        trainer.set(name, &HostTensor::f32(shape, vec![start; shape.numel()]).unwrap()).unwrap();
    }
    subject.loss.begin_norms(&mut trainer, &subject.vae, &subject.inputs(), DType::F32).unwrap();
    for name in &names {
        let ours = trainer.read(name).unwrap().to_f64();
        let theirs = subject.read(&name.replace("discriminator.", "start.")).to_f64();
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() <= 1e-4 * b.abs().max(1e-3), "{name}: {a}, PyTorch {b}");
        }
        assert_eq!(ours.len(), theirs.len());
    }
}

#[test]
fn before_its_start_a_discriminator_changes_nothing() {
    let mut subject = vq_vanilla();
    let how = Optimiser { decay: 0.1, coupled: false, ..how(&subject) };
    subject.loss.adversary.as_mut().unwrap().start = 2;
    let mut with = trainer(&subject, &how);
    subject.loss.adversary = None;
    let (mut g, image) = subject.graph();
    subject.loss.step(&mut g, &subject.vae, image, (DType::F32, false), &how).unwrap();
    let mut without = Trainer::new(g, &how, &Weights::new(&Device::Cpu), &Device::Cpu).unwrap();
    for (name, _) in without.parameters() {
        without.set(&name, &with.read(&name).unwrap()).unwrap();
    }
    let batch = subject.read("x").shape()[0];
    without.write("image", &subject.read("x")).unwrap();
    subject.loss.begin(&mut without, batch).unwrap();
    let judge = "discriminator.main.0.weight";
    let first = with.read(judge).unwrap();
    let options = vq_vanilla().loss;
    let adversary = options.adversary.clone().map(|a| Adversary { start: 2, ..a });
    let options = FirstStageLoss { adversary, ..options };
    for step in 0..3 {
        options.at_step(&mut with).unwrap();
        subject.loss.at_step(&mut without).unwrap();
        let reports = [&mut with, &mut without].map(|t| t.step(1e-4, 0.0).unwrap());
        assert_eq!(reports[0].loss == reports[1].loss, step < 2, "step {step}: {reports:?}");
        assert_eq!(with.read(judge).unwrap() == first, step < 2, "step {step}");
    }
    // States go on where they were, running statistics among them.
    let states = with.states().unwrap();
    assert!(states.iter().any(|(name, _)| name == "discriminator.main.3.running_var"));
    let mut again = trainer(&vq_vanilla(), &how);
    again
        .resume(3, |name| {
            Ok(states.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1.clone())
        })
        .unwrap();
    options.at_step(&mut with).unwrap();
    options.at_step(&mut again).unwrap();
    assert_eq!(with.step(1e-4, 0.0).unwrap(), again.step(1e-4, 0.0).unwrap());
    assert_eq!(with.states().unwrap(), again.states().unwrap());
}

#[test]
fn an_average_is_kept_of_the_autoencoder_and_exported_beside_the_discriminator() {
    let subject = vq_vanilla();
    let how = Optimiser { average: true, ..how(&subject) };
    let mut trainer = trainer(&subject, &how);
    subject.loss.at_step(&mut trainer).unwrap();
    let before = trainer.export(false).unwrap();
    trainer.step(1e-3, 1.0).unwrap();
    // The average keeps all of itself; the discriminator has none, and goes as it is.
    let (now, average) = (trainer.export(false).unwrap(), trainer.export(true).unwrap());
    for ((name, old), (now, average)) in before.iter().zip(now.iter().zip(&average)) {
        let expected = if name.starts_with("discriminator.") { &now.1 } else { old };
        assert!(average.1 == *expected, "{name}");
    }
    assert!(before != now && average != now && average != before);
}

/// A discriminator in evaluation mode, from a checkpoint with the names of the CompVis code.
#[test]
fn a_discriminator_judges_as_pytorch_does() {
    let subject = kl();
    let model = subject.loss.adversary.as_ref().unwrap().model.clone();
    let (mut g, image) = subject.graph();
    g.train(false);
    let logits = model.evaluate(&mut g, "", image).unwrap();
    g.output("logits", logits);
    let mut weights = Weights::new(&Device::Cpu);
    for (_, v, layout) in g.weights() {
        let from = if v.name.contains("running") { "after" } else { "start" };
        let x = subject.read(&format!("{from}.{}", v.name));
        let x = if layout == Layout::Conv { x.permute(&[0, 2, 3, 1]).unwrap() } else { x };
        weights.insert_as(&v.name, &x, layout).unwrap();
    }
    let mut program = Program::new(g, &weights, &Device::Cpu).unwrap();
    program.write("image", &subject.read("x")).unwrap();
    program.run(&mut ()).unwrap();
    let (ours, theirs) = (program.read("logits").unwrap(), subject.read("judged"));
    assert_eq!(ours.shape(), theirs.shape());
    let size = theirs.to_f64().iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (a, b) in ours.to_f64().iter().zip(theirs.to_f64()) {
        assert!((a - b).abs() <= 1e-5 * size, "{a}, PyTorch {b}");
    }
    // What is asked of a checkpoint is what it holds.
    let inventory = ldm::models::Inventory::of(&model.inventory(DType::F32).unwrap());
    let held: BTreeSet<&str> = subject.record.names().filter_map(|n| n.strip_prefix("start.")).collect();
    assert_eq!(inventory.iter().map(|(name, ..)| name).collect::<BTreeSet<_>>(), held);
}

#[test]
fn a_discriminator_with_actnorm_has_the_published_number_of_parameters() {
    let config = serde_json::json!({"use_actnorm": true});
    let model =
        NLayerDiscriminator::from_config(&Config::from_value("config.json", config).unwrap()).unwrap();
    let inventory = ldm::models::Inventory::of(&model.inventory(DType::F32).unwrap());
    assert_eq!(inventory.parameters(), 2_766_529);
}

#[test]
fn a_discriminator_starts_as_compvis_starts_it() {
    let mut g = Graph::new();
    g.train(true);
    let x = g.input("x", DType::F32, [1, 32, 32, 3]);
    let (logits, _) = NLayerDiscriminator::default().train(&mut g, "", x).unwrap();
    assert_eq!(*g.shape(logits), [1, 2, 2, 1]);
    let parameters: Vec<(String, Shape)> =
        g.parameters().iter().map(|p| (p.name.clone(), g.shape(p.state))).collect();
    let count: usize = parameters.iter().map(|(_, s)| s.numel()).sum();
    assert_eq!(count, 2_765_633, "parameters of the published discriminator");
    for ((name, shape), value) in parameters.iter().zip(initial_discriminator(&parameters, 1).unwrap()) {
        let v = value.to_f64();
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        let deviation = (v.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / v.len() as f64).sqrt();
        if name.ends_with("weight") {
            assert!((deviation - 0.02).abs() < 0.003, "{name}: {deviation}");
            assert!((mean - if shape.len() == 1 { 1.0 } else { 0.0 }).abs() < 0.01, "{name}: {mean}");
        } else if ["main.3.bias", "main.6.bias", "main.9.bias"].contains(&&**name) {
            assert!(v.iter().all(|&v| v == 0.0), "{name}");
        }
    }
}
