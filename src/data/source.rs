//! Where the pictures of a training run come from: drawn, or read from a folder.

use super::folder::Folder;
use super::shapes::{LabelledBox, World};
use super::transform::{Filter, Transform, resize};
use crate::error::{Error, Result};
use crate::io::picture;
use crate::rng::Small;

/// One picture, ready to be put into a batch.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Sample {
    /// Shape (S,S,3), 0 to 255.
    pub pixels: Vec<u8>,
    /// What it shows; empty where nothing is said.
    pub caption: String,
    /// Its class, from 0.
    pub class: Option<usize>,
    /// What else is known of it.
    pub extras: Extras,
}

/// What some conditionings need besides caption and class. A source gives the same of these for each picture.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Extras {
    /// Boxes with classes.
    pub boxes: Option<Vec<LabelledBox>>,
    /// Labels, shape (S,S).
    pub semantic_map: Option<Vec<u8>>,
    /// The same picture smaller, shape (S/factor, S/factor, 3), 0 to 255.
    pub low_resolution: Option<Vec<u8>>,
    /// 1 in the hole to paint and 0 outside, shape (S,S).
    pub mask: Option<Vec<u8>>,
}

/// A data set.
pub trait Source: Send + Sync + 'static {
    /// Pictures of an epoch; `None` where there is no end.
    fn len(&self) -> Option<u64>;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Side S of the pictures, in pixels.
    fn side(&self) -> usize;

    /// Picture number `index`, below [`Source::len`]. What is left to chance comes from `draw` alone.
    ///
    /// # Errors
    /// [`Error::File`] for a picture that cannot be read: it is left out. Any other error ends the run.
    fn sample(&self, index: u64, draw: &mut Small) -> Result<Sample>;
}

/// The scenes of a [`World`], drawn as they are needed.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    world: World,
    low_resolution: Option<usize>,
    extras: bool,
}

impl Drawn {
    /// Pictures, captions and classes.
    pub fn new(world: World) -> Drawn {
        Drawn { world, low_resolution: None, extras: false }
    }

    /// Boxes, semantic maps and masks too.
    pub fn with_extras(self) -> Drawn {
        Drawn { extras: true, ..self }
    }

    /// Pictures `factor` times smaller too.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `factor` does not divide the side.
    pub fn with_low_resolution(self, factor: usize) -> Result<Drawn> {
        check_factor(self.world.side(), factor)?;
        Ok(Drawn { low_resolution: Some(factor), ..self })
    }
}

fn check_factor(side: usize, factor: usize) -> Result<()> {
    if factor == 0 || !side.is_multiple_of(factor) {
        return Err(Error::invalid(format!(
            "data: want a factor of the low resolution that divides the size of {side}; got {factor}"
        )));
    }
    Ok(())
}

impl Source for Drawn {
    fn len(&self) -> Option<u64> {
        None
    }

    fn side(&self) -> usize {
        self.world.side()
    }

    fn sample(&self, index: u64, _: &mut Small) -> Result<Sample> {
        let scene = self.world.scene(index);
        let low_resolution = self.low_resolution.map(|f| scene.low_resolution(f)).transpose()?;
        let extras = Extras {
            boxes: self.extras.then(|| scene.boxes()),
            semantic_map: self.extras.then(|| scene.semantic_map()),
            low_resolution,
            mask: self.extras.then(|| scene.mask()),
        };
        Ok(Sample { pixels: scene.draw(), caption: scene.caption(), class: Some(scene.class()), extras })
    }
}

/// The pictures of a [`Folder`], each through a [`Transform`].
#[derive(Clone, Debug)]
pub struct Pictures {
    folder: Folder,
    transform: Transform,
    low_resolution: Option<usize>,
}

impl Pictures {
    /// Pictures, captions and classes.
    pub fn new(folder: Folder, transform: Transform) -> Pictures {
        Pictures { folder, transform, low_resolution: None }
    }

    /// Pictures `factor` times smaller too, bicubic, as super-resolution in Rombach et al. 2022 has them.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `factor` does not divide the size.
    pub fn with_low_resolution(self, factor: usize) -> Result<Pictures> {
        check_factor(self.transform.size, factor)?;
        Ok(Pictures { low_resolution: Some(factor), ..self })
    }
}

impl Source for Pictures {
    fn len(&self) -> Option<u64> {
        Some(self.folder.items().len() as u64)
    }

    fn side(&self) -> usize {
        self.transform.size
    }

    fn sample(&self, index: u64, draw: &mut Small) -> Result<Sample> {
        let items = self.folder.items();
        let Some(item) = usize::try_from(index).ok().and_then(|i| items.get(i)) else {
            return Err(Error::invalid(format!("data: want a picture below {}; got {index}", items.len())));
        };
        let picture = picture::read(&item.path)?;
        let pixels = self.transform.apply(&picture, draw).map_err(|e| Error::file(&item.path, e))?;
        let side = self.side();
        let smaller = |f: usize| resize(&pixels, [side; 2], [side / f; 2], Filter::Bicubic);
        let low_resolution = self.low_resolution.map(smaller).transpose()?;
        let caption = item.caption.clone().unwrap_or_default();
        Ok(Sample {
            pixels,
            caption,
            class: item.class,
            extras: Extras { low_resolution, ..Extras::default() },
        })
    }
}
