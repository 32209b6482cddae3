//! y\[g,c\] = Σ over the rows of a group of x\[g,row,c\]: gradients of biases, and of vectors that are added to every pixel.
//!
//! PyTorch: `x.sum(dim=range(x.dim() - 1))`, `x.flatten(1, -2).sum(1)`. Kernel: `kernels/reduce.cu`. Parts of the rows are
//! summed by themselves and added up in order, so that the bits depend on the shape alone.
use super::prelude::*;
use crate::kernels::reduce as k;
use rayon::prelude::*;

/// Column sums of x (…,C): over all rows to (C) in f32, or over those of each image, x (B,…,C), to (B,C) in the type of x.
#[derive(Clone, PartialEq, Debug)]
pub struct SumRows {
    /// One sum for each index of the first axis.
    pub by_image: bool,
}

/// Elements of a part, on the CPU.
const CHUNK: usize = 1 << 14;
/// Rows of a part, on a GPU: enough that its sums, which are written and read again, do not count.
const PART: usize = 512;

impl SumRows {
    /// Groups, and rows of each.
    fn sizes(&self, x: Shape) -> (usize, usize) {
        let groups = if self.by_image { x[0] } else { 1 };
        (groups, x.rows() / groups.max(1))
    }
}

/// Parts of the rows of a group on a GPU, and the rows of a part.
fn parts(rows: usize) -> (usize, usize) {
    let parts = rows.div_ceil(PART).clamp(1, 128);
    let each = rows.div_ceil(parts).max(1);
    (rows.div_ceil(each).max(1), each)
}

impl Operation for SumRows {
    const NAME: &'static str = "sum_rows";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (…,C), or x (B,…,C) where images are summed by themselves, of a float type";
        let [x0] = args(Self::NAME, want, x)?;
        let axes = 1 + self.by_image as usize;
        ensure!(x0.shape.len() >= axes && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        let c = x0.shape.last();
        Ok(vec![if self.by_image {
            Spec::new(x0.dtype, [x0.shape[0], c])
        } else {
            Spec::new(DType::F32, [c])
        }])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let ((groups, rows), c) = (self.sizes(x[0].shape), x[0].shape.last());
        let mut y = Array::zeros(if self.by_image { Shape::from([groups, c]) } else { Shape::from([c]) });
        x[0].data.iter().enumerate().for_each(|(i, v)| y.data[i / (rows * c) * c + i % c] += v);
        vec![y]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let ((groups, rows), c) = (self.sizes(io.x[0].shape), io.x[0].shape.last());
        let (x, each) = (io.slice(0), (CHUNK / c.max(1)).clamp(1, rows.max(1)));
        let parts = rows.div_ceil(each);
        cpu::with_scratch(groups * parts * c, |sums| {
            sums.par_chunks_mut(c.max(1)).enumerate().for_each(|(i, sum)| {
                let (group, first) = (i / parts, i % parts * each);
                let start = (group * rows + first) * c;
                x.with(start..start + each.min(rows - first) * c, |x| cpu::math::sum_rows(x, sum));
            });
            io.write(0, |y| {
                for (y, sums) in y.chunks_mut(c.max(1)).zip(sums.chunks(parts * c)) {
                    cpu::math::sum_rows(sums, y);
                }
            });
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (x, wide) = (*io.x_spec(0), !self.by_image);
        let ((groups, rows), c) = (self.sizes(x.shape), x.shape.last());
        let (parts, each) = parts(rows);
        let (y, f32s) = if wide { (Default::default(), io.y(0)) } else { (io.y(0), Default::default()) };
        let partial = if parts > 1 { io.scratch } else { Default::default() };
        let p = k::SumRowsFwd {
            y,
            wide: f32s,
            partial,
            x: io.x(0),
            rows: io.int(rows)?,
            c: io.int(c)?,
            each: io.int(each)?,
        };
        io.launch(k::SUM_ROWS_FWD, x.dtype, "", [c.div_ceil(k::COLUMNS), parts, groups], k::BLOCK, p)?;
        if parts == 1 {
            return Ok(());
        }
        let n = groups * c;
        let (second, splits) = (Default::default(), io.int(parts)?);
        let p = k::SumParts { y, wide: f32s, second, partial, n: io.int(n)?, c: io.int(c)?, splits };
        io.launch(k::SUM_PARTS, x.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn scratch(&self, x: &[Spec], _y: &[Spec]) -> usize {
        let (groups, rows) = self.sizes(x[0].shape);
        match parts(rows).0 {
            1 => 0,
            parts => groups * parts * x[0].shape.last() * size_of::<f32>(),
        }
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(x[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let sum = |by_image, x: &[usize]| Case::new(SumRows { by_image }, [t(x)]);
        vec![
            sum(false, &[1]),
            sum(false, &[7]),
            sum(false, &[3, 5]),
            sum(false, &[2, 9, 9, 33]),
            sum(false, &[1300, 40]),
            sum(false, &[5000, 3]),
            sum(true, &[3, 1]),
            sum(true, &[2, 5]),
            sum(true, &[3, 7, 5, 64]),
            sum(true, &[2, 37, 31, 8]),
            sum(false, &[2, 64, 64, 320]).bench(),
            sum(true, &[2, 64, 64, 320]).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        Case::new(
            SumRows { by_image: r.below(2) == 0 },
            [t([r.below(4) + 1, r.below(900) + 1, r.below(40) + 1])],
        )
    }
}
