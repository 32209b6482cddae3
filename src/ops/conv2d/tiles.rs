//! Which kernel takes a product, in which tiles, with its sums split into how many parts.

use super::super::prelude::*;
use super::{Conv2d, Linear, floats, tensor_cores};
use crate::backend::cpu::gemm::ConvShape;

/// The kernels that work in tiles: each says what it takes, in which tiles, how long that takes, and how it is launched.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Engine {
    TensorCores,
    Floats,
}

impl Engine {
    const ALL: [Engine; 2] = [Engine::TensorCores, Engine::Floats];

    fn conv(self, op: &Conv2d, x: &[Spec]) -> Option<Sums> {
        match self {
            Engine::TensorCores => tensor_cores::conv(op, x),
            Engine::Floats => floats::conv(op, x),
        }
    }

    fn linear(self, op: &Linear, x: &[Spec]) -> Option<Sums> {
        match self {
            Engine::TensorCores => tensor_cores::linear(op, x),
            Engine::Floats => floats::linear(op, x),
        }
    }

    fn tiles(self) -> &'static [Tile] {
        match self {
            Engine::TensorCores => &tensor_cores::TILES,
            Engine::Floats => &floats::TILES,
        }
    }

    /// Microseconds by the model.
    fn time(self, tile: Tile, sums: &Sums, splits: usize) -> f64 {
        match self {
            Engine::TensorCores => tensor_cores::microseconds(tile, sums, splits),
            Engine::Floats => floats::microseconds(tile, sums, splits),
        }
    }
}

/// A product that a kernel with tiles takes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Tiled {
    engine: Engine,
    pub sums: Sums,
    pub tile: Tile,
    pub splits: usize,
}

impl Tiled {
    fn new(engine: Engine, sums: Sums, asked: Option<Choice>) -> Option<Tiled> {
        let (tile, splits) =
            sums.choose(engine.tiles(), asked, |tile, splits| engine.time(tile, &sums, splits))?;
        Some(Tiled { engine, sums, tile, splits })
    }

    /// `None`: the plain kernel takes it.
    pub(super) fn conv(op: &Conv2d, x: &[Spec]) -> Option<Tiled> {
        Engine::ALL.into_iter().find_map(|e| Tiled::new(e, e.conv(op, x)?, op.choice))
    }

    /// `None`: the plain kernel takes it.
    pub(super) fn linear(op: &Linear, x: &[Spec]) -> Option<Tiled> {
        Engine::ALL.into_iter().find_map(|e| Tiled::new(e, e.linear(op, x)?, op.choice))
    }

    /// What a kernel makes of such sums, of which it takes all.
    #[cfg(test)]
    pub(super) fn of_tensor_cores(sums: Sums) -> Tiled {
        Tiled::new(Engine::TensorCores, sums, None).expect("some tile suits")
    }

    /// See [`Tiled::of_tensor_cores`].
    #[cfg(test)]
    pub(super) fn of_floats(sums: Sums) -> Tiled {
        Tiled::new(Engine::Floats, sums, None).expect("some tile suits")
    }

    /// All that could be asked of a convolution.
    pub(super) fn choices_conv(op: &Conv2d, x: &[Spec]) -> Vec<Choice> {
        Engine::ALL.into_iter().flat_map(|e| choices(e, e.conv(op, x))).collect()
    }

    /// All that could be asked of a matrix product.
    pub(super) fn choices_linear(op: &Linear, x: &[Spec]) -> Vec<Choice> {
        Engine::ALL.into_iter().flat_map(|e| choices(e, e.linear(op, x))).collect()
    }

    /// Bytes of the partial sums.
    pub(super) fn partial_bytes(&self) -> usize {
        self.tile.partial_bytes(self.sums.m, self.sums.n, self.splits)
    }

    /// Blocks along x, y and z.
    pub(super) fn grid(&self) -> [usize; 3] {
        [self.sums.m.div_ceil(self.tile.rows), self.sums.n.div_ceil(self.tile.columns), self.splits]
    }

    /// The launch, and its time by the model.
    pub(super) fn plan(&self, dtype: DType) -> LaunchPlan {
        let time = self.engine.time(self.tile, &self.sums, self.splits);
        let (name, grid) = (self.tile.name, self.grid());
        let plan = match self.engine {
            Engine::TensorCores => {
                let k = tensor_cores::k::CONV2D_MMA;
                LaunchPlan::new(k, dtype, name, grid, tensor_cores::k::BLOCK.of(name), time)
            }
            Engine::Floats => {
                LaunchPlan::new(floats::k::CONV2D_F32, dtype, name, grid, floats::k::BLOCK.of(name), time)
            }
        };
        LaunchPlan { splits: self.splits, ..plan }
    }

    pub(super) fn launch_conv(&self, op: &Conv2d, s: &ConvShape, io: &cuda::Call) -> Result<()> {
        match self.engine {
            Engine::TensorCores => tensor_cores::launch_conv(self, op, s, io),
            Engine::Floats => floats::launch_conv(self, op, s, io),
        }
    }

    pub(super) fn launch_linear(&self, op: &Linear, io: &cuda::Call) -> Result<()> {
        match self.engine {
            Engine::TensorCores => tensor_cores::launch_linear(self, op, io),
            Engine::Floats => floats::launch_linear(self, op, io),
        }
    }
}

fn choices(engine: Engine, sums: Option<Sums>) -> Vec<Choice> {
    let all = sums.into_iter().flat_map(|sums| sums.all(engine.tiles()));
    all.map(|(tile, splits)| Choice { variant: tile.name, splits }).collect()
}

/// Whether every corner of a window fits the 14 bits and the sign that the kernels keep it in.
pub(super) fn corners_fit(op: &Conv2d, s: &ConvShape) -> bool {
    let corner = |out: usize, kernel: usize| out * op.stride + kernel < 0x4000;
    corner(s.out_h, s.kh) && corner(s.out_w, s.kw) && s.pad_top.max(s.pad_left) < 0x4000
}

/// Fills in the fields of a kernel's struct that say where a convolution's windows lie: the same in every kernel of the room.
macro_rules! windows {
    ($io:expr, $s:expr, $p:expr) => {{
        let (io, s, p) = ($io, $s, &mut $p);
        (p.h, p.w_, p.c) = (io.int(s.h)?, io.int(s.w)?, io.int(s.c)?);
        (p.kh, p.kw) = (io.int(s.kh)?, io.int(s.kw)?);
        (p.out_h, p.out_w) = (io.int(s.out_h)?, io.int(s.out_w)?);
        (p.stride, p.top, p.left) = (io.int(s.stride)?, io.int(s.pad_top)?, io.int(s.pad_left)?);
        p.upsample = s.upsample as i32;
    }};
}
pub(super) use windows;

/// Fills in the operands of a product and what its epilogue adds: fields of the same names in every kernel of the room.
macro_rules! operands {
    ($io:expr, $epi:expr, $p:expr) => {{
        let (io, epi, p): (_, &super::Epi, _) = ($io, $epi, &mut $p);
        let at = epi.inputs();
        let input = |i: usize| if i == 0 { $crate::kernels::DevicePtr::NULL } else { io.x(i) };
        (p.y, p.x, p.w) = (io.y(0), io.x(0), io.x(1));
        (p.bias, p.time, p.residual) = (input(at.bias), input(at.time), input(at.residual));
        p.counter = input(at.step);
        p.time_rows = if epi.time { io.int(io.x_spec(at.time).shape.rows())? } else { 1 };
        p.act = $crate::ops::activation::code(epi.act);
    }};
}
pub(super) use operands;

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
    /// Whether a warp has values and their gates.
    pub gates: bool,
}

pub(super) const fn tile(name: &'static str, rows: usize, columns: usize) -> Tile {
    Tile { name, rows, columns, gates: true }
}

impl Tile {
    pub(super) const fn without_gates(self) -> Tile {
        Tile { gates: false, ..self }
    }

    /// Tiles of m×n results.
    pub(super) fn count(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }

    /// Clocks in which sums in several parts are added up, at 40 bytes in each: every block writes its own once; the one of a
    /// tile that goes on to the end reads as many, and for each further pair writes and reads again.
    pub(super) fn additions(self, splits: usize) -> (f64, f64) {
        let (pairs, part) =
            (splits.next_power_of_two().ilog2(), (self.rows * self.columns * 4) as f64 / 40.0);
        if splits == 1 { (0.0, 0.0) } else { (part, f64::from(2 * pairs - 1) * part) }
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
    /// Half of the columns are gates of the others.
    pub gates: bool,
    /// Blocks that a part of a sum has at least.
    pub least: usize,
}

impl Sums {
    pub(super) fn new(m: usize, n: usize, blocks: usize) -> Sums {
        Sums { m, n, blocks, part: n, rows: m, gates: false, least: 4 }
    }

    /// Every tile that suits, with every number of splits.
    pub(super) fn all(self, tiles: &'static [Tile]) -> impl Iterator<Item = (Tile, usize)> {
        let Sums { m, n, blocks, part, rows, gates, least } = self;
        let whole = move |t: &Tile| {
            (part == n || part % t.columns == 0) && (rows == m || rows % t.rows == 0) && (t.gates || !gates)
        };
        // Twice: where a card has no room for a tile, it is two of half its rows.
        let counted = move |t: Tile, splits| splits == 1 || 2 * t.count(m, n) * splits <= cuda::COUNTERS;
        let splits = 1..=MOST_SPLITS.min(blocks / least).max(1);
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
