//! The rooms: one file per operation, with everything that is known about it.
//!
//! A room states its shape rule, its specification in f64, its CPU code, its CUDA launch, its cost and the cases it is
//! tested on. Tests and benches walk `rooms!` and name no operation.

mod array;
mod case;
pub mod launch;

pub use array::Array;
pub use case::{Arg, Case, Fill, Ty, f32s, ids, t};

use crate::backend::{cpu, cuda};
use crate::error::{Error, Result};
use crate::graph::{GivenStats, Graph, Rewrite, Target, Var};
use crate::rng::Small;
use crate::tensor::Spec;
use launch::LaunchPlan;
use std::fmt::Debug;

/// What a room works with.
pub(crate) mod prelude {
    pub(crate) use super::launch::{self, LaunchPlan};
    pub(crate) use super::{Array, Case, Cost, Operation, args, f32s, ids, t};
    pub(crate) use crate::backend::{cpu, cuda};
    pub(crate) use crate::error::{Error, Result};
    pub(crate) use crate::graph::{Graph, Rewrite, Target, Var};
    pub(crate) use crate::rng::Small;
    pub(crate) use crate::tensor::{DType, Shape, Spec};
}

/// Everything this engine can compute. One line per room; `$then` is a macro that receives the list.
#[macro_export]
macro_rules! rooms {
    ($then:ident) => {
        $then! {
            activation: Activation, ActivationGrad;
            actnorm: ActNorm, ActNormGrad;
            add: Add;
            adversarial: LogitLoss, LogitLossGrad, AdaptiveWeight, Scale;
            attention: Attention, AttentionGrad;
            batch_norm: BatchNorm, BatchNormGrad, Running;
            blend: Blend;
            cast: Cast;
            concat: Concat, Slice;
            conv2d: Conv2d, Linear, WeightGrad, TransposeWeights;
            embedding: Embedding, EmbeddingGrad;
            gaussian: Gaussian, GaussianGrad;
            geglu: Geglu, GegluGrad;
            group_norm: GroupNorm, GroupNormGrad;
            group_stats: GroupStats;
            layer_norm: LayerNorm, LayerNormGrad;
            linear_group: LinearGroup;
            loss: Loss, LossGrad, Kl, KlGrad;
            max_pool: MaxPool, MaxPoolGrad;
            optimiser: Adam, SquareSum, Clip, Accumulate;
            perceptual: Perceptual, PerceptualGrad, Standardize;
            phase_weights: PhaseWeights;
            quantize: Quantize, CodeUsage;
            reduce: SumRows;
            resample: SumPool, Dilate;
            sampler: Prepare, Advance;
            timestep: Timestep;
        }
    };
}

/// Work of one call, for rooflines.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Cost {
    /// Floating-point operations; a fused multiply-add counts two.
    pub flops: f64,
    /// Bytes that must be read and written once.
    pub bytes: f64,
}

impl Cost {
    /// `flops`, and each input and output touched once.
    pub fn streaming(flops: usize, x: &[Spec], y: &[Spec]) -> Cost {
        let bytes: usize = x.iter().chain(y).map(Spec::bytes).sum();
        Cost { flops: flops as f64, bytes: bytes as f64 }
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// The contract of a room.
pub trait Operation: Clone + PartialEq + Debug + Into<Op> {
    /// Name in dumps, errors, tests and benches; the stem of the file and of its kernel.
    const NAME: &'static str;

    /// Shapes and types of the outputs. The only place where inputs are judged.
    ///
    /// # Errors
    /// [`Error::Shape`] with the rule in letters and what came.
    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>>;

    /// The specification: plain f64 loops. Inputs have passed [`Operation::infer`].
    fn spec(&self, x: &[Array]) -> Vec<Array>;

    /// The size of what is summed into each output element, the unit of the elementwise error bound. By default the
    /// operation applied to absolute values; an operation that subtracts inside says its own.
    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.spec(&x.iter().map(|a| a.map(f64::abs)).collect::<Vec<_>>())
    }

    /// CPU code: computes in f32, rounds once at the store.
    ///
    /// # Errors
    /// Data-dependent faults only (an id out of range).
    fn cpu(&self, io: &mut cpu::Call) -> Result<()>;

    /// CUDA launch: grid, block, arguments.
    ///
    /// # Errors
    /// [`Error::Cuda`] from the driver.
    fn cuda(&self, io: &cuda::Call) -> Result<()>;

    /// Gradients of the inputs as new nodes, one per input. Returns; never accumulates.
    ///
    /// # Errors
    /// [`Error::NoGradient`] where there is no rule.
    fn grad(&self, _g: &mut Graph, _x: &[Var], _y: &[Var], _dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        Err(Error::NoGradient(Self::NAME))
    }

    /// Floating-point operations and bytes.
    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost;

    /// Bytes of scratch memory that [`Operation::cuda`] needs during the call; the planner finds a place for it.
    fn scratch(&self, _x: &[Spec], _y: &[Spec]) -> usize {
        0
    }

    /// Bytes that [`Operation::cpu`] takes beside its inputs and outputs, on all threads of the current pool together.
    /// By default those of f32 copies of 16-bit operands.
    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        cpu::copies(x, y)
    }

    /// The input that may be a packed weight on the CPU: the right operand of a product.
    fn packed(&self) -> Option<usize> {
        None
    }

    /// Pairs (output, input) that may share memory: element i of the output depends on element i of that input alone.
    fn in_place(&self) -> &'static [(usize, usize)] {
        &[]
    }

    /// Pairs (output, input) that must share memory: the input is a state, the output its new value.
    fn updates(&self) -> &'static [(usize, usize)] {
        &[]
    }

    /// A cheaper way to compute `at`, which this room made, on a target; `None` where there is none. The new inputs must
    /// exist before the node that makes `at`. It is asked again of what it offered, until it offers nothing.
    fn fuse(&self, _g: &Graph, _at: Var, _target: Target) -> Option<Rewrite> {
        None
    }

    /// The same op that also emits the [`channel_stats`] of its first output, as its last one; `None` where its kernel for
    /// these inputs cannot.
    fn with_stats(&self, _x: &[Spec]) -> Option<Op> {
        None
    }

    /// The same result from statistics that are given, where this op, with the inputs `x`, would compute them itself.
    fn given_stats(&self, _g: &Graph, _x: &[Var]) -> Option<GivenStats> {
        None
    }

    /// On a GPU: another form of this op for these inputs, that input of it, and the op through which it passes first. For weights,
    /// which in a graph that runs many times is done once.
    fn prepared(&self, _x: &[Spec]) -> Option<(Op, usize, Op)> {
        None
    }

    /// Name of the kernel variant for these shapes, as listed in the `.cu`; empty where there is one only.
    fn variant(&self, _x: &[Spec]) -> &'static str {
        ""
    }

    /// The launches that [`Operation::cuda`] makes for these inputs, with their predicted times; empty where the room does
    /// not say.
    fn launches(&self, _x: &[Spec]) -> Vec<LaunchPlan> {
        vec![]
    }

    /// This op with each of the launches that its kernel could make for these inputs, for a measurement; empty where there is
    /// nothing to choose.
    fn choices(&self, _x: &[Spec]) -> Vec<Op> {
        vec![]
    }

    /// The shapes that tests and benches walk.
    fn cases() -> Vec<Case>;

    /// A small random case.
    fn random(r: &mut Small) -> Case;
}

/// The inputs as an array of known length, with an error that says how many are wanted.
///
/// # Errors
/// [`Error::Shape`].
pub fn args<const N: usize>(op: &'static str, want: &str, x: &[Spec]) -> Result<[Spec; N]> {
    <[Spec; N]>::try_from(x).map_err(|_| shape_error(op, want, x))
}

/// An [`Error::Shape`] without a node label.
pub fn shape_error(op: &'static str, want: &str, x: &[Spec]) -> Error {
    let got = x.iter().map(Spec::to_string).collect::<Vec<_>>().join(", ");
    Error::Shape { op, node: String::new(), want: want.into(), got }
}

/// `ensure!(condition, NAME, "rule in letters", inputs)`: [`Error::Shape`] where the condition fails.
#[macro_export]
#[doc(hidden)]
macro_rules! ensure {
    ($condition:expr, $op:expr, $want:expr, $x:expr) => {
        if !$condition {
            return Err($crate::ops::shape_error($op, AsRef::<str>::as_ref(&$want), $x));
        }
    };
}

/// One line of the list, for the harnesses.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// File stem, also that of the kernel file.
    pub stem: &'static str,
    /// [`Operation::NAME`].
    pub name: &'static str,
    /// [`Operation::cases`].
    pub cases: fn() -> Vec<Case>,
    /// [`Operation::random`].
    pub random: fn(&mut Small) -> Case,
}

macro_rules! define {
    ($($file:ident : $($Op:ident),+ ;)+) => {
        $(mod $file; $(pub use $file::$Op;)+)+

        /// Any operation of the list.
        #[derive(Clone, PartialEq, Debug)]
        #[allow(missing_docs)]
        pub enum Op { $($($Op($Op),)+)+ }

        $($(impl From<$Op> for Op { fn from(op: $Op) -> Op { Op::$Op(op) } })+)+

        macro_rules! each { ($self:ident, $op:ident => $body:expr) => {
            match $self { $($(Op::$Op($op) => $body,)+)+ }
        } }

        /// The list as data.
        pub const ROOMS: &[Room] = &[$($(Room {
            stem: stringify!($file), name: $Op::NAME, cases: $Op::cases, random: $Op::random,
        },)+)+];

        impl Op {
            /// [`Operation::NAME`].
            pub fn name(&self) -> &'static str { name_of(self) }
            /// [`Operation::infer`].
            pub fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> { each!(self, op => op.infer(x)) }
            /// [`Operation::spec`].
            pub fn spec(&self, x: &[Array]) -> Vec<Array> { each!(self, op => op.spec(x)) }
            /// [`Operation::magnitude`].
            pub fn magnitude(&self, x: &[Array]) -> Vec<Array> { each!(self, op => op.magnitude(x)) }
            /// [`Operation::cpu`].
            pub fn cpu(&self, io: &mut cpu::Call) -> Result<()> { each!(self, op => op.cpu(io)) }
            /// [`Operation::cuda`].
            pub fn cuda(&self, io: &cuda::Call) -> Result<()> { each!(self, op => op.cuda(io)) }
            /// [`Operation::grad`].
            pub fn grad(&self, g: &mut Graph, x: &[Var], y: &[Var], dy: &[Option<Var>])
                -> Result<Vec<Option<Var>>> { each!(self, op => op.grad(g, x, y, dy)) }
            /// [`Operation::cost`].
            pub fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost { each!(self, op => op.cost(x, y)) }
            /// [`Operation::scratch`].
            pub fn scratch(&self, x: &[Spec], y: &[Spec]) -> usize { each!(self, op => op.scratch(x, y)) }
            /// [`Operation::cpu_scratch`].
            pub fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize { each!(self, op => op.cpu_scratch(x, y)) }
            /// [`Operation::packed`].
            pub fn packed(&self) -> Option<usize> { each!(self, op => op.packed()) }
            /// [`Operation::in_place`].
            pub fn in_place(&self) -> &'static [(usize, usize)] { each!(self, op => op.in_place()) }
            /// [`Operation::updates`].
            pub fn updates(&self) -> &'static [(usize, usize)] { each!(self, op => op.updates()) }
            /// [`Operation::fuse`].
            pub fn fuse(&self, g: &Graph, at: Var, target: Target) -> Option<Rewrite> {
                each!(self, op => op.fuse(g, at, target))
            }
            /// [`Operation::with_stats`].
            pub fn with_stats(&self, x: &[Spec]) -> Option<Op> { each!(self, op => op.with_stats(x)) }
            /// [`Operation::given_stats`].
            pub fn given_stats(&self, g: &Graph, x: &[Var]) -> Option<GivenStats> {
                each!(self, op => op.given_stats(g, x))
            }
            /// [`Operation::prepared`].
            pub fn prepared(&self, x: &[Spec]) -> Option<(Op, usize, Op)> { each!(self, op => op.prepared(x)) }
            /// [`Operation::variant`].
            pub fn variant(&self, x: &[Spec]) -> &'static str { each!(self, op => op.variant(x)) }
            /// [`Operation::launches`].
            pub fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> { each!(self, op => op.launches(x)) }
            /// [`Operation::choices`].
            pub fn choices(&self, x: &[Spec]) -> Vec<Op> { each!(self, op => op.choices(x)) }
        }

        fn name_of(op: &Op) -> &'static str {
            fn name<O: Operation>(_: &O) -> &'static str { O::NAME }
            each!(op, op => name(op))
        }
    };
}
rooms!(define);

pub use activation::Act;
pub use adversarial::Criterion;
pub use cast::cast;
pub use conv2d::{Choice, Epi, SLAB, Window};
pub use group_norm::Given;
pub use group_stats::channel_stats;
pub use linear_group::MOST as MOST_PRODUCTS;
pub use loss::Distance;
pub use optimiser::RATES;
pub use sampler::TABLE;
