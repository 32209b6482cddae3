//! The classes that a model draws in place of texts.

use super::Request;
use crate::error::{Error, Result};
use crate::io::{Labels, ModelFolder};
use crate::models::ClassEmbedder;

/// The classes of a model that draws classes.
#[derive(Clone, PartialEq, Debug)]
pub struct Classes {
    /// Those that it has learnt.
    pub labels: Labels,
    /// The class that stands for none, for guidance: the last of the table where it has no name.
    pub null: Option<usize>,
}

impl Classes {
    /// Those of a folder.
    ///
    /// # Errors
    /// When it does not name them, or names more than the table has.
    pub(super) fn read(folder: &ModelFolder, model: &ClassEmbedder) -> Result<Classes> {
        let labels = Labels::read(folder.index())?;
        if labels.iter().any(|(number, _)| number >= model.classes) {
            let want = format!("numbers below the class embedder's n_classes {}", model.classes);
            return Err(folder.index().error("id2label", want));
        }
        let null = Some(model.classes - 1).filter(|n| !labels.contains(*n));
        Ok(Classes { labels, null })
    }

    /// The ids of a request: with guidance the null class, then the class, or that of each picture.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the request names no class that there is, or wants what a class cannot have.
    pub(super) fn ids(&self, r: &Request) -> Result<Vec<i32>> {
        let named = if r.prompts.is_empty() { r.class.as_slice() } else { &r.prompts };
        let classes =
            named.iter().map(|class| Ok(self.labels.find(class)? as i32)).collect::<Result<Vec<_>>>()?;
        if classes.is_empty() {
            let got = if r.prompt.is_empty() { "neither" } else { "a prompt" };
            return Err(Error::invalid(format!(
                "this model draws classes, not texts: want --class NAME or its number; got {got}"
            )));
        }
        if !r.prompt.is_empty() || !r.negative.is_empty() {
            return Err(Error::invalid(
                "this model draws classes, not texts: want no prompt beside the class",
            ));
        }
        match (r.cfg_scale > 1.0, self.null) {
            (false, _) => Ok(classes),
            (true, Some(null)) => Ok([&[null as i32], &classes[..]].concat()),
            (true, None) => Err(Error::invalid(
                "guidance: this model has no null class to guide against (each row of its table has a name); want --cfg-scale 1",
            )),
        }
    }
}
