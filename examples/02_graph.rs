//! A graph from hand: build it, look at the plan, run it.
//!
//!     cargo run --release --example 02_graph

use ldm::exec::{Device, Program, Weights};
use ldm::graph::{Graph, Layout, Target};
use ldm::nn;
use ldm::ops::Act;
use ldm::tensor::{DType, HostTensor, Spec};

fn main() -> ldm::Result<()> {
    let mut g = Graph::new();
    let x = g.input("x", DType::F32, [1, 8, 8, 32]);
    let h = nn::group_norm(&mut g, "norm", x, 8, 1e-5, Act::Silu)?;
    let h = nn::conv3x3(&mut g, "conv", h, 32)?;
    let y = nn::add(&mut g, "residual", x, h)?;
    g.output("y", y);
    print!(
        "as built:\n{}\nas run (the addition is the convolution's epilogue now):\n{}",
        g.show(None),
        Program::show(&g, Target::Cpu)?
    );

    let mut weights = Weights::new(&Device::Cpu);
    for (_, value, layout) in g.weights() {
        let fill = if layout == Layout::Conv { 0.01 } else { 1.0 };
        weights
            .insert(&value.name, &HostTensor::f32(value.spec.shape, vec![fill; value.spec.shape.numel()])?)?;
    }
    let mut program = Program::new(g, &weights, &Device::Cpu)?;
    program.write("x", &HostTensor::zeros(Spec::new(DType::F32, [1, 8, 8, 32])))?;
    program.run(&mut ())?;
    println!("y[0..4] = {:?}", &program.read("y")?.to_f32()[..4]);
    Ok(())
}
