//! Distances that people agree with: LPIPS on VGG16, Zhang et al. 2018; Simonyan and Zisserman 2015.

use super::Model;
use crate::error::{Error, Result};
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::nn::{add, conv3x3, join};
use crate::ops::{Act, Activation, MaxPool, Perceptual, Standardize};
use crate::tensor::DType;

/// Convolutions of 3×3 with ReLU in five stages, each but the first behind a max-pooling, and a linear head for each. Names are
/// those of torchvision, `features.0.weight`, …, and of the `lpips` package, `lin0.model.1.weight`, ….
#[derive(Clone, PartialEq, Debug)]
pub struct Lpips {
    /// Channels of the stages.
    pub channels: [usize; 5],
}

/// Convolutions of a stage.
const LAYERS: [usize; 5] = [2, 2, 3, 3, 3];

impl Default for Lpips {
    /// VGG16.
    fn default() -> Lpips {
        Lpips { channels: [64, 128, 256, 512, 512] }
    }
}

impl Model for Lpips {
    const CLASSES: &'static [&'static str] = &["LPIPS"];

    fn from_config(c: &Config) -> Result<Lpips> {
        c.only(&["net"])?;
        c.neutral("net", &["vgg"])?;
        Ok(Lpips::default())
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let x = g.input("x", dtype, [1, 16, 16, 3]);
        let weights = g.input("weights", DType::F32, [1]);
        self.distance(&mut g, "", x, x, weights)?;
        Ok(vec![g])
    }
}

impl Lpips {
    /// Pictures a, b (B,H,W,3) in −1…1, at least 16², and weights of pictures (B) f32 to the mean weighted distance (1) f32.
    /// Gradients reach a alone. `at` stands before the names. Without the dropout that the CompVis code leaves on in training.
    ///
    /// # Errors
    /// When the pictures are too small.
    pub fn distance(&self, g: &mut Graph, at: &str, a: Var, b: Var, weights: Var) -> Result<Var> {
        let (a, b) = (self.features(g, at, a)?, self.features(g, at, b)?);
        let mut sum = None;
        for (i, (a, b)) in a.into_iter().zip(b).enumerate() {
            let name = join(at, &format!("lin{i}.model.1"));
            let shape = [1, self.channels[i]];
            let w = g.weight(&join(&name, "weight"), Layout::Linear, DType::F32, shape)?;
            let d = g.push(&name, Perceptual, &[a, b, w, weights])?;
            sum = Some(match sum {
                None => d,
                Some(sum) => add(g, &join(&name, "sum"), sum, d)?,
            });
        }
        sum.ok_or_else(|| Error::invalid("LPIPS: no stages"))
    }

    /// The last features of each stage.
    fn features(&self, g: &mut Graph, at: &str, x: Var) -> Result<Vec<Var>> {
        let mut h = g.push(&join(at, "standardize"), Standardize { shifted: true }, &[x])?;
        let (mut all, mut place) = (vec![], 0);
        for (stage, (&layers, &channels)) in LAYERS.iter().zip(&self.channels).enumerate() {
            if stage > 0 {
                h = g.push(&join(at, &format!("features.{place}")), MaxPool, &[h])?;
                place += 1;
            }
            for _ in 0..layers {
                h = conv3x3(g, &join(at, &format!("features.{place}")), h, channels)?;
                h = g.push(&join(at, &format!("features.{}", place + 1)), Activation(Act::Relu), &[h])?;
                place += 2;
            }
            all.push(h);
        }
        Ok(all)
    }
}
