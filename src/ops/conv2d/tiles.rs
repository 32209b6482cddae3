//! Which kernel takes a product; the tiles of those that are not plain, and the choice among them.

use super::super::prelude::*;
use super::floats::FloatProduct;
use super::tensor_cores::Product;
use super::{Conv2d, Linear, floats, tensor_cores};
use crate::backend::cpu::gemm::ConvShape;

/// A product that a kernel with tiles takes.
pub(super) enum Fast {
    TensorCores(Product),
    Floats(FloatProduct),
}

impl Fast {
    /// `None`: the plain kernel takes it.
    pub(super) fn conv(op: &Conv2d, x: &[Spec]) -> Option<Fast> {
        let floats = || FloatProduct::conv(op, x).map(Fast::Floats);
        Product::conv(op, x).map(Fast::TensorCores).or_else(floats)
    }

    /// `None`: the plain kernel takes it.
    pub(super) fn linear(op: &Linear, x: &[Spec]) -> Option<Fast> {
        let floats = || FloatProduct::linear(op, x).map(Fast::Floats);
        Product::linear(op, x).map(Fast::TensorCores).or_else(floats)
    }

    /// All that could be asked of a convolution.
    pub(super) fn choices_conv(op: &Conv2d, x: &[Spec]) -> Vec<Choice> {
        choices(Product::sums_conv(op, x), FloatProduct::sums_conv(op, x))
    }

    /// All that could be asked of a matrix product.
    pub(super) fn choices_linear(op: &Linear, x: &[Spec]) -> Vec<Choice> {
        choices(Product::sums_linear(op, x), FloatProduct::sums_linear(op, x))
    }

    /// Bytes of the partial sums.
    pub(super) fn partial_bytes(&self) -> usize {
        match self {
            Fast::TensorCores(product) => product.partial_bytes(),
            Fast::Floats(product) => product.partial_bytes(),
        }
    }

    /// Name of the kernel variant.
    pub(super) fn variant(&self) -> &'static str {
        match self {
            Fast::TensorCores(product) => product.variant(),
            Fast::Floats(product) => product.variant(),
        }
    }

    /// The launch, and its time by the model.
    pub(super) fn plan(&self, dtype: DType) -> LaunchPlan {
        match self {
            Fast::TensorCores(product) => product.plan(dtype),
            Fast::Floats(product) => product.plan(),
        }
    }

    pub(super) fn launch_conv(&self, op: &Conv2d, s: &ConvShape, io: &cuda::Call) -> Result<()> {
        match self {
            Fast::TensorCores(product) => product.launch_conv(op, s, io),
            Fast::Floats(product) => product.launch_conv(op, s, io),
        }
    }

    pub(super) fn launch_linear(&self, op: &Linear, io: &cuda::Call) -> Result<()> {
        match self {
            Fast::TensorCores(product) => product.launch_linear(op, io),
            Fast::Floats(product) => product.launch_linear(op, io),
        }
    }
}

fn choices(cores: Option<Sums>, floats: Option<Sums>) -> Vec<Choice> {
    let cores = cores.into_iter().flat_map(|sums| sums.all(&tensor_cores::TILES));
    let floats = floats.into_iter().flat_map(|sums| sums.all(&floats::TILES));
    cores.chain(floats).map(|(tile, splits)| Choice { variant: tile.name, splits }).collect()
}

/// The variant of a product's kernel and the parts that its sums are split into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Of the variants that the kernel file lists.
    pub variant: &'static str,
    /// 1 where they are not split.
    pub splits: usize,
}

/// A variant of a kernel, of which a block computes so many rows and columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tile {
    pub name: &'static str,
    pub rows: usize,
    pub columns: usize,
}

pub(super) const fn tile(name: &'static str, rows: usize, columns: usize) -> Tile {
    Tile { name, rows, columns }
}

impl Tile {
    /// Tiles of m×n results.
    pub(super) fn count(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }

    /// Bytes of the partial sums of m×n results in f32, where there are any.
    pub(super) fn partial_bytes(self, m: usize, n: usize, splits: usize) -> usize {
        if splits == 1 { 0 } else { splits * self.count(m, n) * self.rows * self.columns * 4 }
    }
}

/// Most parts that a sum is split into.
const MOST_SPLITS: usize = 16;

/// What is to be divided into tiles.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Sums {
    /// Rows of y.
    pub m: usize,
    /// Rows of w.
    pub n: usize,
    /// Blocks of channels in each sum.
    pub blocks: usize,
    /// A tile's columns divide these, where they are not all.
    pub part: usize,
    /// A tile's rows divide these, where they are not all.
    pub rows: usize,
}

impl Sums {
    pub(super) fn new(m: usize, n: usize, blocks: usize) -> Sums {
        Sums { m, n, blocks, part: n, rows: m }
    }

    /// Every tile that suits, with every number of splits.
    pub(super) fn all(self, tiles: &'static [Tile]) -> impl Iterator<Item = (Tile, usize)> {
        let Sums { m, n, blocks, part, rows } = self;
        let whole = move |t: &Tile| (part == n || part % t.columns == 0) && (rows == m || rows % t.rows == 0);
        let counted = move |t: Tile, splits| splits == 1 || t.count(m, n) <= cuda::COUNTERS;
        let splits = 1..=MOST_SPLITS.min(blocks / 4).max(1);
        let each = move |t: Tile| splits.clone().filter(move |&s| counted(t, s)).map(move |s| (t, s));
        tiles.iter().copied().filter(whole).flat_map(each)
    }

    /// What is asked for, if it is among them, or else the one with the least predicted time; of what is as good, within
    /// 2 %, the first.
    pub(super) fn choose(
        self,
        tiles: &'static [Tile],
        asked: Option<Choice>,
        time: impl Fn(Tile, usize) -> f64,
    ) -> Option<(Tile, usize)> {
        if let Some(c) = asked {
            return self.all(tiles).find(|(t, splits)| (t.name, *splits) == (c.variant, c.splits));
        }
        let (mut best, mut least) = (None, f64::INFINITY);
        for (tile, splits) in self.all(tiles) {
            let time = time(tile, splits);
            if time < 0.98 * least {
                (best, least) = (Some((tile, splits)), time);
            }
        }
        best
    }
}
