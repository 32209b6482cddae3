//! scratch
use ldm::exec::{Device, DeviceName, Hook, Program, Weights};
use ldm::graph::Node;
use ldm::io::ModelFolder;
use ldm::models::{Inventory, Model, load};
use ldm::pipeline::{Blueprint, Vae};
use ldm::rng::Generator;
use ldm::tensor::HostTensor;
use std::collections::BTreeMap;
use std::time::Instant;
struct T(Vec<f64>, Instant);
impl Hook for T {
    fn before(&mut self, _: usize, _: &Node) -> ldm::Result<()> {
        self.1 = Instant::now();
        Ok(())
    }
    fn after(&mut self, s: usize, _: &Node, _: &dyn Fn(usize) -> ldm::Result<HostTensor>) -> ldm::Result<()> {
        let t = self.1.elapsed().as_secs_f64();
        if self.0.len() <= s {
            self.0.resize(s + 1, f64::MAX);
        }
        self.0[s] = self.0[s].min(t);
        Ok(())
    }
}
fn main() -> ldm::Result<()> {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let (part, side, batch, dtype, iters): (&str, usize, usize, _, usize) =
        (&a[1], a[2].parse().unwrap(), a[3].parse().unwrap(), a[4].parse()?, a[5].parse().unwrap());
    let folder = ModelFolder::open(&a[0])?;
    let blueprint = Blueprint::read(&folder)?;
    let device = Device::open(DeviceName::Cpu)?;
    let (graph, inventory) = match (part, &blueprint.vae) {
        ("unet", _) => {
            let u = &blueprint.unet;
            (u.graph([batch, side, side], 77, dtype)?, u.inventory(dtype)?)
        }
        ("vae", Vae::Kl(v)) => (v.decode_graph([batch, side, side], dtype)?, v.inventory(dtype)?),
        _ => panic!(),
    };
    let mut weights = Weights::new(&device);
    load(&folder.checkpoint(part)?, &Inventory::of(&inventory), |n, t| weights.insert(n, &t))?;
    let mut program = Program::new(graph, &weights, &device)?;
    let mut noise = Generator::new(0);
    for name in ["sample", "context", "latents"].into_iter().filter(|n| program.has(n)).collect::<Vec<_>>() {
        let shape = program.spec(name)?.shape;
        let t = HostTensor::f32(shape, noise.randn(shape.numel()))?;
        program.write(name, &t)?;
    }
    if program.has("timestep") {
        program.write("timestep", &HostTensor::f32([1], vec![481.0])?)?;
    }
    let mut h = T(vec![], Instant::now());
    for _ in 0..iters {
        let s = Instant::now();
        program.run(&mut h)?;
        println!("{:.3} s", s.elapsed().as_secs_f64());
    }
    let g = program.graph();
    let mut by: BTreeMap<String, (usize, f64, f64)> = BTreeMap::new();
    for (i, n) in g.nodes().iter().enumerate() {
        let s = |v: &ldm::graph::Var| g.shape(*v).iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let key = format!("{:12} {} {}", n.op.name(), s(&n.x[0]), n.x.get(1).map(s).unwrap_or_default());
        for k in [key, format!("= {}", n.op.name())] {
            let e = by.entry(k).or_default();
            e.0 += 1;
            e.1 += h.0[i];
            e.2 += g.cost(n).flops;
        }
    }
    let total: f64 = h.0.iter().sum();
    let mut rows: Vec<_> = by.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    for (k, (n, t, f)) in rows.iter().take(60) {
        println!(
            "{k:55} {n:4} {:9.1} ms {:5.1}% {:7.1} GF/s {:7.1} GF",
            t * 1e3,
            t / total * 100.0,
            f / t / 1e9,
            f / 1e9
        );
    }
    println!("total {total:.3}");
    Ok(())
}
