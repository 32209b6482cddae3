//! y = scale · x between f32 and another element type: the seams between f32 state and activations.
//!
//! PyTorch: `(x * scale).to(dtype)`. Kernel: `kernels/cast.cu`, compiled for pairs of types.
use super::case::SINGLE;
use super::prelude::*;
use crate::kernels::cast as k;

/// x to `to`, times `scale`; one of the two types is f32.
#[derive(Clone, PartialEq, Debug)]
pub struct Cast {
    /// Type of the result.
    pub to: DType,
    /// Factor, applied in f32.
    pub scale: f32,
}

impl Operation for Cast {
    const NAME: &'static str = "cast";

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>> {
        let want = "x of a float type, f32 on at least one side";
        let [x0] = args(Self::NAME, want, x)?;
        let float = |t| DType::FLOATS.contains(&t);
        let fits = float(x0.dtype) && float(self.to) && [x0.dtype, self.to].contains(&DType::F32);
        ensure!(fits, Self::NAME, want, x);
        Ok(vec![Spec::new(self.to, x0.shape)])
    }

    fn spec(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].map(|v| v * self.scale as f64)]
    }

    fn magnitude(&self, x: &[Array]) -> Vec<Array> {
        vec![x[0].map(|v| (v * self.scale as f64).abs())]
    }

    fn cpu(&self, io: &mut cpu::Call) -> Result<()> {
        io.update(0, 0, |_, y| y.iter_mut().for_each(|y| *y *= self.scale));
        Ok(())
    }

    fn cuda(&self, io: &cuda::Call) -> Result<()> {
        let n = io.y_spec(0).shape.numel();
        let p = k::CastFwd { y: io.y(0), x: io.x(0), n: n as i64, scale: self.scale };
        let types = (io.x_spec(0).dtype, self.to);
        io.launch(k::CAST_FWD, types, "", [n.div_ceil(k::BLOCK), 1, 1], k::BLOCK, p)
    }

    fn cpu_scratch(&self, _x: &[Spec], y: &[Spec]) -> usize {
        cpu::working_bytes(y[0].shape.last())
    }

    /// What reaches a weight that was cast is f32 already.
    fn grad(&self, g: &mut Graph, x: &[Var], _y: &[Var], dy: &[Option<Var>]) -> Result<Vec<Option<Var>>> {
        let [Some(dy)] = dy else { return Ok(vec![None]) };
        Ok(vec![Some(cast(g, "dx", *dy, g.spec(x[0]).dtype, self.scale as f64)?)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost::streaming(y[0].shape.numel(), x, y)
    }

    fn cases() -> Vec<Case> {
        let mut all = Vec::new();
        for (to, _) in SINGLE {
            for (scale, shape) in [(1.0, vec![1]), (0.18215, vec![2, 3, 5, 4]), (-3.0, vec![1000])] {
                all.push(case(to, scale, &shape));
            }
        }
        all
    }

    fn random(r: &mut Small) -> Case {
        case(DType::FLOATS[r.below(3)], r.normal() as f32, &[r.below(9) + 1, r.below(300) + 1])
    }
}

/// `scale` · x in another type; x itself where that changes nothing.
///
/// # Errors
/// When neither type is f32.
pub fn cast(g: &mut Graph, at: &str, x: Var, to: DType, scale: f64) -> Result<Var> {
    if g.spec(x).dtype == to && scale == 1.0 {
        return Ok(x);
    }
    g.push(at, Cast { to, scale: scale as f32 }, &[x])
}

/// To f32 from every type; to another type from f32 alone.
fn case(to: DType, scale: f32, shape: &[usize]) -> Case {
    let case = Case::new(Cast { to, scale }, [t(shape)]);
    if to == DType::F32 { case } else { case.only(&[DType::F32]) }
}
