//! Steps of the optimiser, vectorised.

use super::super::simd::{Isa, Kernel, Simd};

/// One step of Adam, see [`crate::ops::Adam`].
#[derive(Clone, Copy)]
pub struct AdamStep {
    /// β₁ and β₂.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay.
    pub decay: f32,
    /// Decay is added to the gradient.
    pub coupled: bool,
    /// Learning rate, 1 − β₁ᵗ, 1 − β₂ᵗ, what the average keeps of itself.
    pub rates: [f32; 4],
    /// Of the gradient.
    pub factor: f32,
}

struct Step<'a> {
    p: AdamStep,
    w: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    g: &'a [f32],
}

impl Kernel for Step<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let AdamStep { betas: [b1, b2], eps, decay, coupled, rates, factor } = self.p;
        let (step, root) = (rates[0] / rates[1], 1.0 / rates[2].sqrt());
        let (to_g, to_w) = if coupled { (decay, 0.0) } else { (0.0, rates[0] * decay) };
        let states = self.w.iter_mut().zip(self.m).zip(self.v);
        for (((w, m), v), g) in states.zip(self.g) {
            let g = g * factor + to_g * *w;
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w = (*w - to_w * *w) - step * (*m / (v.sqrt() * root + eps));
        }
    }
}

struct Average<'a> {
    share: f32,
    w: &'a [f32],
    average: &'a mut [f32],
}

impl Kernel for Average<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.average.iter_mut().zip(self.w).for_each(|(a, w)| *a += self.share * (w - *a));
    }
}

impl AdamStep {
    /// Updates some weights, their moments, and their average; one thread.
    pub fn run(self, w: &mut [f32], m: &mut [f32], v: &mut [f32], average: Option<&mut [f32]>, g: &[f32]) {
        let isa = Isa::best();
        isa.run(Step { p: self, w, m, v, g });
        if let Some(average) = average {
            isa.run(Average { share: 1.0 - self.rates[3], w, average });
        }
    }
}

/// Σ x² in f64, on one thread.
pub fn square_sum(x: &[f32]) -> f64 {
    Isa::best().run(super::Moments(x)).1
}
