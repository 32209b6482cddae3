//! The transposes of nearest-neighbour doubling and of a stride: what their gradients pass through.
//!
//! PyTorch: `4 * F.avg_pool2d(x, 2)`; a tensor of zeros with `y[:, ::s, ::s] = x`. Kernel: `kernels/resample.cu`.
use super::prelude::*;
use crate::kernels::resample as k;

/// x (B,2H,2W,C) to (B,H,W,C): the sum of each 2×2 pixels.
#[derive(Clone, PartialEq, Debug)]
pub struct SumPool;

impl Operation for SumPool {
    const NAME: &'static str = "sum_pool";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (B,2H,2W,C) of a float type";
        let [x0] = args(Self::NAME, want, x)?;
        let even = x0.shape.len() == 4 && x0.shape[1] % 2 == 0 && x0.shape[2] % 2 == 0;
        ensure!(even && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        Ok(vec![Spec::new(x0.dtype, [x0.shape[0], x0.shape[1] / 2, x0.shape[2] / 2, x0.shape[3]])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let s = x[0].shape;
        vec![Array::from_fn([s[0], s[1] / 2, s[2] / 2, s[3]], |i| {
            let four = [(0, 0), (0, 1), (1, 0), (1, 1)];
            four.iter().map(|(dy, dx)| x[0].at(&[i[0], 2 * i[1] + dy, 2 * i[2] + dx, i[3]])).sum()
        })]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, w, c) = (io.slice(0), io.y[0].shape[2], io.y[0].shape[3]);
        let line = w * c;
        io.rows(0, line, |first, y| {
            for (i, y) in y.chunks_mut(line).enumerate() {
                x.with((first + i) * 4 * line..(first + i + 1) * 4 * line, |x| {
                    let (above, below) = x.split_at(2 * line);
                    let pairs = above.chunks_exact(2 * c).zip(below.chunks_exact(2 * c));
                    for (y, (a, b)) in y.chunks_exact_mut(c).zip(pairs) {
                        for j in 0..c {
                            y[j] = (a[j] + a[c + j]) + (b[j] + b[c + j]);
                        }
                    }
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let y = *io.y_spec(0);
        let n = y.shape.numel() / launch::at_once(y.dtype, &[y.shape[3]]);
        let (w, c) = (io.int(y.shape[2])?, io.int(y.shape[3])?);
        let p = k::SumPoolFwd { y: io.y(0), x: io.x(0), n: io.int(n)?, w, c };
        io.launch(k::SUM_POOL_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(3 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes = [
            [1, 2, 2, 1],
            [1, 2, 4, 3],
            [2, 4, 2, 5],
            [1, 6, 10, 8],
            [3, 2, 2, 33],
            [2, 8, 8, 16],
            [1, 16, 4, 7],
            [1, 10, 6, 320],
        ];
        let mut all: Vec<Case> = shapes.iter().map(|&s| Case::new(SumPool, [t(s)])).collect();
        all.push(Case::new(SumPool, [t([2, 64, 64, 320])]).bench());
        all
    }

    fn random(r: &mut Small) -> Case {
        Case::new(SumPool, [t([r.below(3) + 1, 2 * (r.below(6) + 1), 2 * (r.below(6) + 1), r.below(20) + 1])])
    }
}

/// x (B,H,W,C) to (B,(H−1)·s+1,(W−1)·s+1,C): x on every s-th pixel, zeros between.
#[derive(Clone, PartialEq, Debug)]
pub struct Dilate {
    /// s.
    pub stride: usize,
}

impl Operation for Dilate {
    const NAME: &'static str = "dilate";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (B,H,W,C) of a float type, H, W, stride > 0";
        let [x0] = args(Self::NAME, want, x)?;
        let pixels = x0.shape.len() == 4 && x0.shape[1] > 0 && x0.shape[2] > 0 && self.stride > 0;
        ensure!(pixels && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        let wide = |n: usize| (n - 1) * self.stride + 1;
        Ok(vec![Spec::new(x0.dtype, [x0.shape[0], wide(x0.shape[1]), wide(x0.shape[2]), x0.shape[3]])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let (s, n) = (x[0].shape, self.stride);
        vec![Array::from_fn([s[0], (s[1] - 1) * n + 1, (s[2] - 1) * n + 1, s[3]], |i| {
            let on = i[1].is_multiple_of(n) && i[2].is_multiple_of(n);
            if on { x[0].at(&[i[0], i[1] / n, i[2] / n, i[3]]) } else { 0.0 }
        })]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, [_, h, w, c], s) = (io.slice(0), four(io.x[0].shape), self.stride);
        let [_, out_h, out_w, _] = four(io.y[0].shape);
        io.rows(0, out_w * c, |first, y| {
            for (i, y) in y.chunks_mut(out_w * c).enumerate() {
                let (image, row) = ((first + i) / out_h, (first + i) % out_h);
                y.fill(0.0);
                if row % s == 0 {
                    let start = (image * h + row / s) * w * c;
                    for (j, y) in y.chunks_mut(c).step_by(s).enumerate() {
                        x.read(start + j * c, y);
                    }
                }
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (y, [_, h, w, c]) = (*io.y_spec(0), four(io.x_spec(0).shape));
        let n = y.shape.numel() / launch::at_once(y.dtype, &[c]);
        let p = k::DilateFwd {
            y: io.y(0),
            x: io.x(0),
            n: io.int(n)?,
            h: io.int(h)?,
            w: io.int(w)?,
            c: io.int(c)?,
            out_h: io.int(y.shape[1])?,
            out_w: io.int(y.shape[2])?,
            stride: io.int(self.stride)?,
        };
        io.launch(k::DILATE_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(0, x, y)
    }

    fn cases() -> Vec<Case> {
        let dilate = |stride, x: [usize; 4]| Case::new(Dilate { stride }, [t(x)]);
        vec![
            dilate(2, [1, 1, 1, 1]),
            dilate(2, [1, 2, 3, 4]),
            dilate(2, [2, 5, 4, 7]),
            dilate(3, [1, 3, 3, 8]),
            dilate(1, [2, 2, 2, 3]),
            dilate(2, [3, 8, 8, 16]),
            dilate(4, [1, 2, 5, 33]),
            dilate(2, [1, 7, 1, 320]),
            dilate(2, [2, 32, 32, 320]).bench(),
        ]
    }

    fn random(r: &mut Small) -> Case {
        let x = [r.below(3) + 1, r.below(7) + 1, r.below(7) + 1, r.below(20) + 1];
        Case::new(Dilate { stride: r.below(3) + 1 }, [t(x)])
    }
}

fn four(s: Shape) -> [usize; 4] {
    [s[0], s[1], s[2], s[3]]
}
