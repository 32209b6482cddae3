//! y_i = x w_iᵀ + bias_i for many weights of one x: [`Linear`]s in one launch, on a GPU.
//!
//! Keys and values of a prompt are products of the same tokens in all layers, and each block of a UNet takes its own product of the
//! timestep's embedding. By themselves they leave most of the card idle. `graph::fuse` joins them where the model of
//! [`launch`] says that one launch is clearly faster. Kernel: `kernels/linear_group.cu`.
use super::array::dot;
use super::conv2d::tiles_microseconds;
use super::prelude::*;
use super::{Epi, Linear, Op};
use crate::backend::cpu::gemm::{Dense, Epilogue, gemm, working_bytes};
use crate::kernels::linear_group as k;

/// Products that one launch takes.
pub const MOST: usize = k::MOST;

/// Matrix products of x (…,C) with w_i (O_i,C), each with its bias (O_i) where `bias`, to y_i (…,O_i). The inputs are x, the weights,
/// the biases. 16-bit types.
#[derive(Clone, PartialEq, Debug)]
pub struct LinearGroup {
    /// How many there are, up to [`MOST`].
    pub products: usize,
    /// Whether each has a bias.
    pub bias: bool,
}

impl LinearGroup {
    /// Whether a node may be one of a group: with a bias or without.
    pub(crate) fn takes(op: &Op, x: &[Spec]) -> Option<bool> {
        let Op::Linear(Linear { epi, more: 0, choice: None }) = op else { return None };
        let bias = epi.bias;
        let plain = *epi == Epi { bias, ..Epi::default() };
        let alone = LinearGroup { products: 1, bias };
        (plain && alone.infer(x).is_ok()).then_some(bias)
    }

    fn weights<'a, V>(&self, x: &'a [V]) -> &'a [V] {
        &x[1..1 + self.products]
    }

    /// The launch with the least predicted time: variant, blocks of the grid, microseconds.
    fn plan(&self, x: &[Spec]) -> (&'static str, [usize; 2], f64) {
        let (m, c) = (x[0].shape.rows(), x[0].shape.last());
        let tiles = self.weights(x).iter().map(|w| w.shape[0].div_ceil(k::BN)).sum::<usize>();
        let plan = |name| {
            let (rows, columns) = (k::BM.of(name), k::BN);
            let time = tiles_microseconds([rows, columns], [m, tiles * columns], c.div_ceil(k::BK));
            (name, [m.div_ceil(rows), tiles], time)
        };
        let first = plan(k::VARIANTS[0]);
        k::VARIANTS[1..].iter().map(|name| plan(name)).fold(first, |a, b| if b.2 < a.2 { b } else { a })
    }
}

// The model of tiles counts blocks of channels of the product's kernel.
const _: () = assert!(k::BK == crate::kernels::conv2d_mma::BK);

impl Operation for LinearGroup {
    const NAME: &'static str = "linear_group";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = format!(
            "x (…,C), {n} weights (O_i,C){}, one 16-bit type; 1 to {MOST} products, none empty, C and each O_i multiples of 8",
            if self.bias { format!(", {} biases (O_i)", self.products) } else { String::new() },
            n = self.products,
        );
        let n = self.products;
        let fits = (1..=MOST).contains(&n)
            && x.len() == 1 + n * if self.bias { 2 } else { 1 }
            && !x[0].shape.is_empty()
            && matches!(x[0].dtype, DType::F16 | DType::BF16)
            && x.iter().all(|s| s.dtype == x[0].dtype && s.shape.numel() < 1 << 31);
        ensure!(fits, Self::NAME, want, x);
        let c = x[0].shape.last();
        let product = |(i, w): (usize, &Spec)| {
            let fits = w.shape.len() == 2 && w.shape[1] == c && w.shape[0] % 8 == 0 && w.shape[0] > 0;
            fits && (!self.bias || *x[1 + n + i].shape == [w.shape[0]])
        };
        let fits = x[0].shape.numel() > 0 && c % 8 == 0 && self.weights(x).iter().enumerate().all(product);
        ensure!(fits, Self::NAME, want, x);
        Ok(self.weights(x).iter().map(|w| Spec::new(w.dtype, x[0].shape.with_last(w.shape[0]))).collect())
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let c = x[0].shape.last();
        let product = |(i, w): (usize, &Array)| {
            let (o, mut y) = (w.shape[0], Array::zeros(x[0].shape.with_last(w.shape[0])));
            for (at, v) in y.data.iter_mut().enumerate() {
                *v = dot(&x[0].data[at / o * c..][..c], w.row(&[at % o]));
                if self.bias {
                    *v += x[1 + self.products + i].data[at % o];
                }
            }
            y
        };
        self.weights(x).iter().enumerate().map(product).collect()
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (m, c, x) = (io.x[0].shape.rows(), io.x[0].shape.last(), io.slice(0));
        for i in 0..self.products {
            let bias = self.bias.then(|| io.slice(1 + self.products + i));
            cpu::optional(bias, |bias| {
                let epilogue = Epilogue { bias, ..Epilogue::default() };
                let (w, o) = (io.weights(1 + i), io.y[i].shape.last());
                gemm(&Dense::new(x, m, c), w, o, &epilogue, io.out(i));
            });
        }
        Ok(())
    }

    fn cpu_scratch(&self, x: &[Spec], y: &[Spec]) -> usize {
        let of = |y: &Spec| working_bytes(y.dtype, y.shape.rows(), y.shape.last(), x[0].shape.last());
        y.iter().map(of).max().unwrap_or(0)
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let specs: Vec<Spec> = io.x.iter().map(|x| x.spec).collect();
        let x = specs[0];
        let mut p = k::LinearGroupFwd {
            x: io.x(0),
            m: io.int(x.shape.rows())?,
            c: io.int(x.shape.last())?,
            end: [i32::MAX; MOST],
            ..Default::default()
        };
        let mut tiles = 0;
        for (i, w) in self.weights(&specs).iter().enumerate() {
            tiles += w.shape[0].div_ceil(k::BN);
            (p.y[i], p.w[i]) = (io.y(i), io.x(1 + i));
            (p.o[i], p.end[i]) = (io.int(w.shape[0])?, io.int(tiles)?);
            if self.bias {
                p.bias[i] = io.x(1 + self.products + i);
            }
        }
        let (variant, [rows, columns], _) = self.plan(&specs);
        io.launch(k::LINEAR_GROUP_FWD, x.dtype, variant, [rows, columns, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let weights = self.weights(x).iter().map(|w| w.shape.numel()).sum::<usize>();
        Cost::streaming(x[0].shape.rows().saturating_mul(2 * weights), x, y)
    }

    fn variant(&self, x: &[Spec]) -> &'static str {
        self.plan(x).0
    }

    fn launches(&self, x: &[Spec]) -> Vec<LaunchPlan> {
        let (variant, [rows, columns], time) = self.plan(x);
        let grid = [rows, columns, 1];
        vec![LaunchPlan::new(k::LINEAR_GROUP_FWD, x[0].dtype, variant, grid, k::BLOCK, time)]
    }

    fn cases() -> Vec<Case> {
        let wide: Vec<usize> = (0..MOST).map(|i| 8 * (i % 5 + 1)).collect();
        let mut all = vec![
            group(&[1, 8], &[8], false),
            group(&[5, 72], &[8, 64, 72], true),
            group(&[16, 200], &[136, 8], false),
            group(&[17, 64], &[64, 128, 8], true),
            group(&[2, 35, 264], &[48, 80, 48], false),
            group(&[130, 128], &[72, 64], true),
            group(&[3, 40], &wide, true),
            group(&[66, 24], &wide, false),
        ];
        all.extend(real().into_iter().map(|(x, outs, bias)| {
            let case = group(&x, &outs, bias);
            let inputs = 1..case.args.len();
            case.weights(inputs).bench()
        }));
        all
    }

    fn random(r: &mut Small) -> Case {
        let outs: Vec<usize> = (0..r.below(6) + 1).map(|_| 8 * (r.below(20) + 1)).collect();
        group(&[r.below(90) + 1, 8 * (r.below(30) + 1)], &outs, r.below(2) == 0)
    }
}

fn group(x: &[usize], outs: &[usize], bias: bool) -> Case {
    let c = *x.last().unwrap_or(&1);
    let mut args = vec![t(x)];
    args.extend(outs.iter().map(|&o| t([o, c]).normal(0.0, 1.0 / (c as f64).sqrt())));
    args.extend(outs.iter().filter(|_| bias).map(|&o| t([o])));
    Case::new(LinearGroup { products: outs.len(), bias }, args).only(&[DType::F16, DType::BF16])
}

/// Real groups: x, each O, biases. Keys and values of SD 1.5; embeddings of the timestep of its 22 residual blocks, of one evaluation
/// and of thirty; queries, keys and values of its text encoder.
fn real() -> Vec<(Vec<usize>, Vec<usize>, bool)> {
    let keys = [[320; 4], [640; 4], [1280; 4], [1280; 4], [1280; 4]].concat();
    let keys = [keys, [[640; 6], [320; 6]].concat()].concat();
    let blocks = [vec![320; 2], vec![640; 2], vec![1280; 12], vec![640; 3], vec![320; 3]].concat();
    vec![
        (vec![2, 77, 768], keys, false),
        (vec![1, 1280], blocks.clone(), true),
        (vec![31, 1280], blocks, true),
        (vec![2, 77, 768], vec![768; 3], true),
    ]
}
