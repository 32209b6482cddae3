//! The parts of a pipeline: weights that stay on the device, or are there only while their stage runs.

use crate::error::Result;
use crate::exec::{Device, Graph, Weights};
use crate::io::{Checkpoint, ModelFolder};
use crate::models::{Inventory, Model, Source};
use crate::tensor::DType;
use std::borrow::Cow;
use std::collections::HashSet;

/// How long the weights of a pipeline's parts stay on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Residency {
    /// From opening on, all of them: for many requests.
    #[default]
    Always,
    /// Each part from the beginning to the end of its stage: the least memory, for a single request. A further request
    /// reads them again.
    Staged,
}

/// Puts the weights that are `wanted` on a device.
///
/// # Errors
/// As [`Source::read`], and when the device has no room.
pub fn upload(source: &Source, device: &Device, wanted: impl Fn(&str) -> bool) -> Result<Weights> {
    let mut weights = Weights::new(device);
    let made = source.read(wanted, |w| weights.make(w.spec, w.layout, |rows, out| w.fill(rows, out)))?;
    made.into_iter().for_each(|(name, weight)| weights.put(&name, weight));
    Ok(weights)
}

/// Puts all weights of an inventory on a device: everything is checked before anything is read.
///
/// # Errors
/// As [`Source::new`] and [`upload`].
pub fn load(checkpoint: Checkpoint, inventory: &Inventory, device: &Device) -> Result<Weights> {
    upload(&Source::new(checkpoint, inventory)?, device, |_| true)
}

/// The weights of one component.
pub(super) enum Part {
    Held(Weights),
    Staged(Source),
}

impl Part {
    /// Checks what the checkpoint's headers say; reads no value.
    pub(super) fn source<M: Model>(
        folder: &ModelFolder,
        name: &str,
        model: &M,
        dtype: DType,
    ) -> Result<Source> {
        Source::new(folder.checkpoint(name)?, &Inventory::of(&model.inventory(dtype)?))
    }

    pub(super) fn new(source: Source, device: &Device, residency: Residency) -> Result<Part> {
        match residency {
            Residency::Always => Ok(Part::Held(upload(&source, device, |_| true)?)),
            Residency::Staged => Ok(Part::Staged(source)),
        }
    }

    /// Whether [`Part::weights`] has to read them.
    pub(super) fn is_staged(&self) -> bool {
        matches!(self, Part::Staged(_))
    }

    /// The weights, at least those of the graph; all where there is none.
    pub(super) fn weights(&self, device: &Device, graph: Option<&Graph>) -> Result<Cow<'_, Weights>> {
        match self {
            Part::Held(weights) => Ok(Cow::Borrowed(weights)),
            Part::Staged(source) => {
                let names = graph.map(|g| g.weights().map(|(_, v, _)| &*v.name).collect::<HashSet<_>>());
                let wanted = |name: &str| names.as_ref().is_none_or(|names| names.contains(name));
                upload(source, device, wanted).map(Cow::Owned)
            }
        }
    }
}
