//! The perceptual distance with weights from a file: a term of the loss of first stages, and a measure of pictures.

use crate::error::{Error, Result};
use crate::exec::{Device, Program, Weights};
use crate::graph::{Graph, Layout};
use crate::io::Checkpoint;
use crate::models::{Lpips, Model};
use crate::nn::join;
use crate::tensor::{DType, HostTensor};
use std::path::Path;

/// Before the names of the term's weights.
pub(super) const PERCEPTUAL: &str = "perceptual";

/// A perceptual distance: Zhang et al. 2018. Its weights are no parameters: see [`PerceptualTerm::load`].
#[derive(Clone, PartialEq, Debug)]
pub struct PerceptualTerm {
    /// The network.
    pub model: Lpips,
    /// Factor on the distance (`perceptual_weight`).
    pub weight: f64,
}

/// The tensor of a file that is the weight `name` of [`Lpips`]: under that name, or for the convolutions that of the `lpips`
/// package (`net.slice1.0.weight`), perhaps behind another one, such as `loss.perceptual_loss.` in CompVis checkpoints.
fn find<'a>(file: &'a Checkpoint, name: &str) -> Result<&'a str> {
    let own = |held: &&str| match name.strip_prefix("features.") {
        // net.slice1.0.weight
        Some(layer) => held.strip_suffix(layer).is_some_and(|stem| {
            stem.ends_with("features.")
                || stem.trim_end_matches('.').rsplit('.').next().is_some_and(|s| s.starts_with("slice"))
        }),
        None => held.ends_with(name),
    };
    file.names().find(own).ok_or_else(|| {
        Error::invalid(format!(
            "LPIPS: want a tensor `{name}`; the file has none: give one with torchvision's VGG16 and the heads"
        ))
    })
}

impl PerceptualTerm {
    /// With the network of a file, of VGG16's form: its heads say how wide it is. Reads no value.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the name of the head that is missing, or has another form.
    pub fn of(file: &Checkpoint, weight: f64) -> Result<PerceptualTerm> {
        let mut channels = [0; 5];
        for (i, channels) in channels.iter_mut().enumerate() {
            let name = find(file, &format!("lin{i}.model.1.weight"))?;
            let shape = file.entry(name).map(|e| e.shape.clone()).unwrap_or_default();
            *channels = match shape[..] {
                [1, c] | [1, c, 1, 1] if c > 0 => c,
                _ => return Err(Error::invalid(format!("LPIPS: `{name}`: want (1,C,1,1); got {shape:?}"))),
            };
        }
        Ok(PerceptualTerm { model: Lpips { channels }, weight })
    }

    /// Puts its weights, for graphs that compute in `dtype`, into those of a program. The file holds the names of [`Lpips`], or
    /// those of the `lpips` package for the convolutions (`net.slice1.0.weight`), perhaps behind another name, such as
    /// `loss.perceptual_loss.` in CompVis checkpoints.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the name that is missing; when a tensor has another shape.
    pub fn load(&self, file: &Checkpoint, dtype: DType, into: &mut Weights) -> Result<()> {
        for (_, value, layout) in self.model.inventory(dtype)?[0].weights() {
            let x = file.read(find(file, &value.name)?, value.spec.dtype)?;
            let x = if layout == Layout::Conv { x.permute(&[0, 2, 3, 1])? } else { x };
            // Not packed for products: the backward pass transposes them.
            into.insert(&join(PERCEPTUAL, &value.name), &x.reshape(value.spec.shape)?)?;
        }
        Ok(())
    }
}

/// The perceptual distance between pictures, in f32.
pub struct PerceptualDistance {
    model: Lpips,
    weights: Weights,
    device: Device,
    /// Of the size (width, height) that was last asked for.
    program: Option<([usize; 2], Program)>,
}

impl PerceptualDistance {
    /// With the network and the weights of a file, see [`PerceptualTerm::load`].
    ///
    /// # Errors
    /// As there, and when there is no such file.
    pub fn open(path: &Path, device: &Device) -> Result<PerceptualDistance> {
        let file = Checkpoint::open(path)?;
        let term = PerceptualTerm::of(&file, 1.0)?;
        let mut weights = Weights::new(device);
        term.load(&file, DType::F32, &mut weights)?;
        Ok(PerceptualDistance { model: term.model, weights, device: device.clone(), program: None })
    }

    /// LPIPS of two pictures (height, width, 3) of bytes, at least 16².
    ///
    /// # Errors
    /// When they are too small or not of that size, or the device fails.
    pub fn between(&mut self, [width, height]: [usize; 2], a: &[u8], b: &[u8]) -> Result<f64> {
        let shape = [1, height, width, 3];
        if self.program.as_ref().is_none_or(|(size, _)| *size != [width, height]) {
            let mut g = Graph::new();
            let [x, y] = ["a", "b"].map(|name| g.input(name, DType::F32, shape));
            let weights = g.input("weights", DType::F32, [1]);
            let distance = self.model.distance(&mut g, PERCEPTUAL, x, y, weights)?;
            g.output("distance", distance);
            let mut program = Program::new(g, &self.weights, &self.device)?;
            program.write("weights", &HostTensor::f32([1], vec![1.0])?)?;
            self.program = Some(([width, height], program));
        }
        let Some((_, program)) = &mut self.program else { return Err(Error::invalid("LPIPS: no program")) };
        for (name, pixels) in [("a", a), ("b", b)] {
            let signed = pixels.iter().map(|v| f32::from(*v) / 127.5 - 1.0).collect();
            program.write(name, &HostTensor::f32(shape, signed)?)?;
        }
        program.run(&mut ())?;
        Ok(program.read("distance")?.to_f64()[0])
    }
}
