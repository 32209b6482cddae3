//! Test cases: a room's op with input shapes and how to fill them. Correctness, gradient and speed use the same ones.

use super::{Array, Op, Operation};
use crate::rng::Small;
use crate::tensor::{DType, Shape, Spec};
use std::ops::Range;

/// Element type of a case's input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    /// The type under test.
    T,
    /// f32 whatever the type under test.
    F32,
    /// i32.
    I32,
}

/// How an input is filled.
#[derive(Clone, PartialEq, Debug)]
pub enum Fill {
    /// Normal with mean and deviation.
    Normal(f64, f64),
    /// Uniform integers below a bound.
    Below(usize),
    /// Exactly these values.
    Values(Vec<f64>),
}

/// One input of a case.
#[derive(Clone, PartialEq, Debug)]
pub struct Arg {
    /// Axes.
    pub shape: Shape,
    /// Element type.
    pub ty: Ty,
    /// Contents.
    pub fill: Fill,
}

impl Arg {
    /// The same input with another mean and deviation.
    pub fn normal(mut self, mean: f64, deviation: f64) -> Arg {
        self.fill = Fill::Normal(mean, deviation);
        self
    }

    /// The same input with these values.
    pub fn values(mut self, v: Vec<f64>) -> Arg {
        self.fill = Fill::Values(v);
        self
    }
}

/// An input of the type under test, standard normal.
pub fn t(shape: impl Into<Shape>) -> Arg {
    Arg { shape: shape.into(), ty: Ty::T, fill: Fill::Normal(0.0, 1.0) }
}

/// An f32 input, standard normal.
pub fn f32s(shape: impl Into<Shape>) -> Arg {
    Arg { shape: shape.into(), ty: Ty::F32, fill: Fill::Normal(0.0, 1.0) }
}

/// An i32 input, uniform below `bound`.
pub fn ids(shape: impl Into<Shape>, bound: usize) -> Arg {
    Arg { shape: shape.into(), ty: Ty::I32, fill: Fill::Below(bound) }
}

/// An op with its inputs.
#[derive(Clone, PartialEq, Debug)]
pub struct Case {
    /// The op.
    pub op: Op,
    /// Its inputs.
    pub args: Vec<Arg>,
    /// A real shape, timed by the benches and too large for the test harness.
    pub bench: bool,
    /// Which inputs a model holds as weights; the benches do the same.
    pub weights: Range<usize>,
    /// Factor on the error bounds, with the reason for it.
    pub loose: Option<(f64, &'static str)>,
    /// The types it is tested in.
    pub types: &'static [DType],
}

impl Case {
    /// A case for every float type.
    pub fn new(op: impl Operation, args: impl Into<Vec<Arg>>) -> Case {
        Case {
            op: op.into(),
            args: args.into(),
            bench: false,
            weights: 0..0,
            loose: None,
            types: &DType::FLOATS,
        }
    }

    /// Marks a real shape.
    pub fn bench(mut self) -> Case {
        self.bench = true;
        self
    }

    /// Says which inputs a model holds as weights.
    pub fn weights(mut self, inputs: Range<usize>) -> Case {
        self.weights = inputs;
        self
    }

    /// Widens the bounds by a factor; the reason is mandatory.
    pub fn loose(mut self, factor: f64, reason: &'static str) -> Case {
        self.loose = Some((factor, reason));
        self
    }

    /// Restricts the types.
    pub fn only(mut self, types: &'static [DType]) -> Case {
        self.types = types;
        self
    }

    /// Types and shapes of the inputs when the type under test is `t`.
    pub fn specs(&self, t: DType) -> Vec<Spec> {
        let dtype = |ty| match ty {
            Ty::T => t,
            Ty::F32 => DType::F32,
            Ty::I32 => DType::I32,
        };
        self.args.iter().map(|a| Spec::new(dtype(a.ty), a.shape)).collect()
    }

    /// Seeded inputs, rounded to their types.
    pub fn inputs(&self, t: DType, seed: u64) -> Vec<Array> {
        let mut r = Small::new(seed);
        let specs = self.specs(t);
        self.args
            .iter()
            .zip(specs)
            .map(|(arg, spec)| {
                let n = arg.shape.numel();
                let data: Vec<f64> = match &arg.fill {
                    Fill::Normal(mean, sd) => (0..n).map(|_| mean + sd * r.normal()).collect(),
                    Fill::Below(bound) => (0..n).map(|_| r.below(*bound) as f64).collect(),
                    Fill::Values(v) => v.iter().cycle().take(n).copied().collect(),
                };
                Array { shape: arg.shape, data: data.into_iter().map(|v| spec.dtype.round(v)).collect() }
            })
            .collect()
    }

    /// `2x64x64x320 320x3x3x320 320 stride=1 pad=1,1,1,1 bias`: the shapes (six and more of the same as `320x768*10`), and the fields
    /// of the operation that are set.
    pub fn title(&self) -> String {
        let join = |shape: &[usize]| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let mut words: Vec<String> = vec![];
        for same in self.args.chunk_by(|a, b| a.shape == b.shape) {
            match same.len() {
                n @ 6.. => words.push(format!("{}*{n}", join(&same[0].shape))),
                n => words.extend(vec![join(&same[0].shape); n]),
            }
        }
        let mut list = false;
        for line in format!("{:#?}", self.op).lines().map(|l| l.trim().trim_end_matches(',')) {
            match line.split_once(": ") {
                Some((_, "false" | "None" | "0")) => {}
                Some((name, "true")) => words.push(name.into()),
                Some((name, "[")) => {
                    list = true;
                    words.push(format!("{name}="));
                }
                Some((_, value)) if value.ends_with(['{', '(']) => {}
                Some((name, value)) => words.push(format!("{name}={value}")),
                None if line.ends_with(['{', '(', '}', ')', ']']) => list = false,
                None if list => words.iter_mut().last().into_iter().for_each(|w| *w += &format!("{line},")),
                None => words.push(line.into()),
            }
        }
        words.iter().map(|w| w.trim_end_matches(',')).collect::<Vec<_>>().join(" ")
    }

    /// One line: op, shapes, type.
    pub fn name(&self, t: DType) -> String {
        let x = self.specs(t).iter().map(Spec::to_string).collect::<Vec<_>>().join(" ");
        format!("{:?} {x}", self.op)
    }
}

/// Each float type with the list of itself alone, for ops that carry their result's type.
pub(crate) const SINGLE: [(DType, &[DType]); 3] =
    [(DType::F32, &[DType::F32]), (DType::F16, &[DType::F16]), (DType::BF16, &[DType::BF16])];
