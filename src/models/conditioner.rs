//! What makes the context that the UNet attends to, whatever it is made from.

use super::{ClassEmbedder, ClipText, LdmBert, Model};
use crate::error::{Error, Result};
use crate::graph::{Graph, Var};
use crate::ops::cast;
use crate::tensor::DType;

/// A model from ids (B,T) to a context (B,T,E): of a text's tokens, or of one class.
#[derive(Clone, PartialEq, Debug)]
pub enum Conditioner {
    /// CLIP's text encoder.
    Clip(ClipText),
    /// The text encoder of 2022.
    Bert(LdmBert),
    /// A table of classes.
    Class(ClassEmbedder),
    /// There is no context.
    Nothing,
}

impl Conditioner {
    /// The folder that it is in, and its part of a training step.
    pub fn part(&self) -> &'static str {
        match self {
            Conditioner::Clip(_) => "text_encoder",
            Conditioner::Bert(_) => "bert",
            Conditioner::Class(_) => "class_embedder",
            Conditioner::Nothing => "",
        }
    }

    /// Width E of the context, and the key of the configuration that says it.
    pub fn width(&self) -> (usize, &'static str) {
        match self {
            Conditioner::Clip(m) => (m.hidden, "hidden_size"),
            Conditioner::Bert(m) => (m.hidden, "d_model"),
            Conditioner::Class(m) => (m.width, "embed_dim"),
            Conditioner::Nothing => (0, ""),
        }
    }

    /// Longest context, in tokens.
    pub fn tokens(&self) -> usize {
        match self {
            Conditioner::Clip(m) => m.positions,
            Conditioner::Bert(m) => m.positions,
            Conditioner::Class(_) => 1,
            Conditioner::Nothing => 0,
        }
    }

    /// Ids that it knows: 0 to below this.
    pub fn vocabulary(&self) -> usize {
        match self {
            Conditioner::Clip(m) => m.vocabulary,
            Conditioner::Bert(m) => m.vocabulary,
            Conditioner::Class(m) => m.classes,
            Conditioner::Nothing => 0,
        }
    }

    /// Layers, where the last ones can be left out.
    pub fn layers(&self) -> usize {
        match self {
            Conditioner::Clip(m) => m.layers,
            Conditioner::Bert(_) | Conditioner::Class(_) | Conditioner::Nothing => 0,
        }
    }

    /// ids (B,T) i32 to the context (B,T,E).
    ///
    /// # Errors
    /// When T is longer than [`Conditioner::tokens`], or there is no context.
    pub fn build(&self, g: &mut Graph, ids: Var, dtype: DType) -> Result<Var> {
        match self {
            Conditioner::Clip(m) => Ok(m.build(g, ids, dtype)?.last),
            Conditioner::Bert(m) => Ok(m.build(g, ids, dtype)?.1),
            Conditioner::Class(m) => m.build(g, ids, dtype),
            Conditioner::Nothing => Err(Error::invalid("a context of a model that has none")),
        }
    }

    /// ids (B,T) i32 to `context` (B,T,E) f32; `skip` leaves out that many of the last layers.
    ///
    /// # Errors
    /// When T is too long, or there are fewer layers than are skipped.
    pub fn context_graph(&self, b: usize, t: usize, dtype: DType, skip: usize) -> Result<Graph> {
        if let Conditioner::Clip(m) = self {
            return m.context_graph(b, t, dtype, skip);
        }
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [b, t]);
        let context = self.build(&mut g, ids, dtype)?;
        let context = cast(&mut g, "context", context, DType::F32, 1.0)?;
        g.output("context", context);
        Ok(g)
    }

    /// Small graphs that together use every weight once.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        match self {
            Conditioner::Clip(m) => m.inventory(dtype),
            Conditioner::Bert(m) => m.inventory(dtype),
            Conditioner::Class(m) => m.inventory(dtype),
            Conditioner::Nothing => Ok(vec![]),
        }
    }
}
