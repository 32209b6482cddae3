//! y = a + b, elementwise.
//!
//! PyTorch: `a + b`. Kernel: `kernels/add.cu`.
use super::prelude::*;
use crate::kernels::add as k;

/// y = a + b for a, b of one shape.
#[derive(Clone, PartialEq, Debug)]
pub struct Add;

impl Operation for Add {
    const NAME: &'static str = "add";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "a, b of one shape and float type";
        let [a, b] = args(Self::NAME, want, x)?;
        ensure!(a == b && DType::FLOATS.contains(&a.dtype), Self::NAME, want, x);
        Ok(vec![a])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].zip(&x[1], |a, b| a + b)]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        // Either term may be in the sum's memory, or both.
        if io.shares(0) && io.shares(1) {
            io.update(0, 0, |_, y| y.iter_mut().for_each(|y| *y += *y));
            return Ok(());
        }
        let (kept, other) = if io.shares(1) { (1, io.slice(0)) } else { (0, io.slice(1)) };
        io.update(kept, 0, |at, y| {
            other.with(at..at + y.len(), |x| y.iter_mut().zip(x).for_each(|(y, x)| *y += x));
        });
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let spec = io.y_spec(0);
        let n = spec.shape.numel();
        let per_block = k::BLOCK * 16 / spec.dtype.size();
        let params = k::AddFwd { y: io.y(0), a: io.x(0), b: io.x(1), n: n as i64 };
        io.launch(k::ADD_FWD, spec.dtype, "", [n.div_ceil(per_block), 1, 1], k::BLOCK, params)
    }

    fn grad(&self, _g: &mut Graph, _x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        Ok(vec![dy[0], dy[0]])
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(y[0].shape.numel(), x, y)
    }

    fn in_place(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    /// a + conv(x) becomes an epilogue of the convolution, if nothing else reads it.
    fn fuse(&self, g: &Graph, at: Var, _target: Target) -> Option<Rewrite> {
        super::conv2d::absorb_residual(g, at)
    }

    fn cases() -> Vec<Case> {
        let shapes: [&[usize]; 9] = [
            &[1],
            &[7],
            &[8],
            &[2, 3],
            &[1, 1, 1, 5],
            &[3, 5, 7, 11],
            &[2, 16, 16, 32],
            &[1, 255, 9],
            &[3, 1, 1, 320],
        ];
        let mut all: Vec<Case> = shapes.iter().map(|&s| Case::new(Add, [t(s), t(s)])).collect();
        all.push(Case::new(Add, [t([2, 64, 64, 320]), t([2, 64, 64, 320])]).bench());
        all
    }

    fn random(r: &mut Small) -> Case {
        let s = [r.below(4) + 1, r.below(9) + 1, r.below(50) + 1];
        Case::new(Add, [t(s), t(s)])
    }
}
