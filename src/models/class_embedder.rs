//! Classes as a condition: a table with a row for each, which the UNet attends to as a context of one token (Rombach et al.
//! 2022, section 4.4 and appendix E.2). CompVis `ClassEmbedder`.

use super::Model;
use crate::error::Result;
use crate::graph::{Graph, Layout, Var};
use crate::io::Config;
use crate::ops::Embedding;
use crate::tensor::DType;

/// An embedding of classes.
#[derive(Clone, PartialEq, Debug)]
pub struct ClassEmbedder {
    /// Rows of the table. Where the model was trained for guidance, the last one is the null class.
    pub classes: usize,
    /// Width of a row.
    pub width: usize,
}

impl Model for ClassEmbedder {
    const CLASSES: &'static [&'static str] = &["ClassEmbedder"];

    /// Keys are the arguments of the CompVis class: `n_classes`, `embed_dim`, and `key`, which says where its batches have the
    /// class.
    fn from_config(c: &Config) -> Result<ClassEmbedder> {
        c.only(&["n_classes", "embed_dim", "key"])?;
        let model = ClassEmbedder { classes: c.usize("n_classes")?, width: c.usize("embed_dim")? };
        for (key, n) in [("n_classes", model.classes), ("embed_dim", model.width)] {
            if n == 0 {
                return Err(c.error(key, "at least 1"));
            }
        }
        Ok(model)
    }

    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
        let mut g = Graph::new();
        let ids = g.input("ids", DType::I32, [1, 1]);
        self.build(&mut g, ids, dtype)?;
        Ok(vec![g])
    }
}

impl ClassEmbedder {
    /// Classes (B,1) i32 to tokens (B,1,E).
    ///
    /// # Errors
    /// None that a built graph can have.
    pub fn build(&self, g: &mut Graph, ids: Var, dtype: DType) -> Result<Var> {
        let table = g.weight("embedding.weight", Layout::Same, dtype, [self.classes, self.width])?;
        g.push("embedding", Embedding { positions: false }, &[ids, table])
    }
}
