//! The largest of each 2×2 pixels.
//!
//! PyTorch: `F.max_pool2d(x, 2)`. Kernel: `kernels/max_pool.cu`. Of equal ones the first in reading order gets the gradient.
use super::Op;
use super::prelude::*;
use crate::kernels::max_pool as k;

/// x (B,H,W,C) to (B,⌊H/2⌋,⌊W/2⌋,C).
#[derive(Clone, PartialEq, Debug)]
pub struct MaxPool;

fn four(s: Shape) -> [usize; 4] {
    [s[0], s[1], s[2], s[3]]
}

/// Which of four values, in reading order, counts.
fn largest<V: PartialOrd + Copy>(v: [V; 4]) -> usize {
    // A NaN is not equal to itself, and stays.
    (1..4).fold(0, |best, k| if v[k] > v[best] || v[k].partial_cmp(&v[k]).is_none() { k } else { best })
}

/// By element of y (B,H',W',C): it, and the place in x of the element that counts.
fn chosen<V: PartialOrd + Copy>(x: &[V], shape: Shape, mut f: impl FnMut(usize, usize)) {
    let [b, h, w, c] = four(shape);
    let (half_h, half_w) = (h / 2, w / 2);
    for i in 0..b * half_h * half_w * c {
        let (pixel, channel) = (i / c, i % c);
        let (row, image) = (pixel / half_w % half_h, pixel / half_w / half_h);
        let first = ((image * h + 2 * row) * w + pixel % half_w * 2) * c + channel;
        let places = [first, first + c, first + w * c, first + w * c + c];
        f(i, places[largest(places.map(|at| x[at]))]);
    }
}

impl Operation for MaxPool {
    const NAME: &'static str = "max_pool";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (B,H,W,C) of a float type, H, W > 1";
        let [x0] = args(Self::NAME, want, x)?;
        let fits = x0.shape.len() == 4 && x0.shape[1] > 1 && x0.shape[2] > 1;
        ensure!(fits && DType::FLOATS.contains(&x0.dtype), Self::NAME, want, x);
        let [b, h, w, c] = four(x0.shape);
        Ok(vec![Spec::new(x0.dtype, [b, h / 2, w / 2, c])])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let [b, h, w, c] = four(x[0].shape);
        let mut y = Array::zeros([b, h / 2, w / 2, c]);
        chosen(&x[0].data, x[0].shape, |i, at| y.data[i] = x[0].data[at]);
        vec![y]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, shape) = (io.slice(0), io.x[0].shape);
        let [_, h, w, c] = four(shape);
        // A row of y, from two rows of x, at a time.
        io.rows(0, w / 2 * c, |first, y| {
            for (i, y) in y.chunks_mut(w / 2 * c).enumerate() {
                let (image, row) = ((first + i) / (h / 2), (first + i) % (h / 2));
                let start = (image * h + 2 * row) * w * c;
                x.with(start..start + 2 * w * c, |x| {
                    chosen(x, Shape::from([1, 2, w, c]), |i, at| y[i] = x[at]);
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (y, [_, h, w, c]) = (*io.y_spec(0), four(io.x_spec(0).shape));
        let n = y.shape.numel();
        let (h, w, c) = (io.int(h)?, io.int(w)?, io.int(c)?);
        let p = k::MaxPoolFwd { y: io.y(0), x: io.x(0), n: n as i64, h, w, c };
        io.launch(k::MAX_POOL_FWD, y.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(g.push("dx", MaxPoolGrad, &[x[0], *dy])?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(3 * y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let shapes = [
            [1, 2, 2, 1],
            [1, 3, 5, 3],
            [2, 4, 2, 5],
            [1, 6, 10, 8],
            [3, 2, 2, 33],
            [2, 9, 8, 16],
            [1, 16, 5, 7],
            [1, 10, 6, 64],
        ];
        shapes.iter().enumerate().map(|(i, &x)| pool(&x, i as u64)).collect()
    }

    fn random(r: &mut Small) -> Case {
        let x = [r.below(3) + 1, r.below(9) + 2, r.below(9) + 2, r.below(20) + 1];
        pool(&x, r.below(1000) as u64)
    }
}

/// Values of which no two are near each other: differences across a tie say nothing.
fn pool(x: &[usize], seed: u64) -> Case {
    let (mut r, n, [_, h, w, c]) = (Small::new(seed), x.iter().product::<usize>(), four(x.into()));
    let place = |i: usize| i / c / w % h % 2 * 2 + i / c % w % 2;
    let values = (0..n).map(|i| r.below(8) as f64 - 4.0 + 0.25 * place(i) as f64).collect();
    Case::new(MaxPool, [t(x).values(values)])
}

/// x (B,H,W,C), dy (B,⌊H/2⌋,⌊W/2⌋,C) to dx.
#[derive(Clone, PartialEq, Debug)]
pub struct MaxPoolGrad;

impl Operation for MaxPoolGrad {
    const NAME: &'static str = "max_pool_grad";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x (B,H,W,C), dy (B,⌊H/2⌋,⌊W/2⌋,C) of one float type, H, W > 1";
        let [x0, dy] = args(Self::NAME, want, x)?;
        ensure!(MaxPool.infer(&[x0]).is_ok_and(|y| y[0] == dy), Self::NAME, want, x);
        Ok(vec![x0])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        let mut dx = Array::zeros(x[0].shape);
        chosen(&x[0].data, x[0].shape, |i, at| dx.data[at] = x[1].data[i]);
        vec![dx]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        self.spec(&[x[0].clone(), x[1].map(f64::abs)])
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        let (x, dy, [_, h, w, c]) = (io.slice(0), io.slice(1), four(io.x[0].shape));
        let (line, half) = (w * c, w / 2 * c);
        io.rows(0, line, |first, dx| {
            for (i, dx) in dx.chunks_mut(line).enumerate() {
                let (image, row) = ((first + i) / h, (first + i) % h);
                dx.fill(0.0);
                if row / 2 >= h / 2 {
                    continue;
                }
                let (start, from) = ((image * h + row / 2 * 2) * line, (image * (h / 2) + row / 2) * half);
                x.with(start..start + 2 * line, |x| {
                    dy.with(from..from + half, |dy| {
                        chosen(x, Shape::from([1, 2, w, c]), |i, at| {
                            if at / line == row % 2 {
                                dx[at % line] = dy[i];
                            }
                        });
                    });
                });
            }
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let (dx, [_, h, w, c]) = (*io.y_spec(0), four(io.x_spec(0).shape));
        let n = dx.shape.numel();
        let (h, w, c) = (io.int(h)?, io.int(w)?, io.int(c)?);
        let p = k::MaxPoolGrad { dx: io.y(0), x: io.x(0), dy: io.x(1), n: n as i64, h, w, c };
        io.launch(k::MAX_POOL_GRAD, dx.dtype, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(3 * x[1].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        MaxPool::cases().into_iter().map(with_gradient).collect()
    }

    fn random(r: &mut Small) -> Case {
        with_gradient(MaxPool::random(r))
    }
}

fn with_gradient(case: Case) -> Case {
    let Op::MaxPool(op) = &case.op else { return case };
    let dy = op.infer(&case.specs(DType::F32)[..1]).map_or(case.args[0].shape, |y| y[0].shape);
    Case { op: MaxPoolGrad.into(), args: vec![case.args[0].clone(), t(dy)], ..case }
}
