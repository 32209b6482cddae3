//! The models: each reads its configuration and builds graphs; all load their weights in the same way.

mod conditioner;
pub mod load;

pub use conditioner::Conditioner;
pub use load::{Inventory, Source};

use crate::error::Result;
use crate::graph::Graph;
use crate::io::Config;
use crate::tensor::DType;

/// Most resolutions of a model: beyond any that exists, and their factor 2^15 still a handy number.
const MAX_LEVELS: usize = 16;
/// Most layers of one kind in a row: beyond any model, and a graph of them is still built in no time.
const MAX_LAYERS: usize = 256;

/// What every model offers.
pub trait Model: Sized {
    /// The class that configurations name it by.
    const CLASSES: &'static [&'static str];

    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for a key or value that is not understood.
    fn from_config(config: &Config) -> Result<Self>;

    /// Small graphs that together use every weight once: what the checkpoint must hold.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    fn inventory(&self, dtype: DType) -> Result<Vec<Graph>>;
}

/// Every model. One line per file.
#[macro_export]
macro_rules! models {
    ($then:ident) => {
        $then! {
            autoencoder: AutoencoderKL, VQModel;
            class_embedder: ClassEmbedder;
            clip_text: ClipText;
            ldm_bert: LdmBert;
            lpips: Lpips;
            patchgan: NLayerDiscriminator;
            unet_2d: UNet2D;
            unet_2d_condition: UNet2DCondition;
        }
    };
}

macro_rules! define {
    ($($file:ident : $($Model:ident),+ ;)+) => {
        $(mod $file; $(pub use $file::$Model;)+)+

        /// Any model of the list.
        #[derive(Clone, Debug)]
        #[allow(missing_docs)]
        pub enum AnyModel { $($($Model($Model),)+)+ }

        $($(impl From<$Model> for AnyModel { fn from(m: $Model) -> AnyModel { AnyModel::$Model(m) } })+)+

        impl AnyModel {
            /// Reads the configuration of a class; `None` for a class that is not in the list.
            ///
            /// # Errors
            /// As [`Model::from_config`].
            pub fn read(class: &str, config: &Config) -> Result<Option<AnyModel>> {
                $($(if $Model::CLASSES.contains(&class) {
                    return Ok(Some($Model::from_config(config)?.into()));
                })+)+
                Ok(None)
            }

            /// [`Model::inventory`].
            ///
            /// # Errors
            /// As there.
            pub fn inventory(&self, dtype: DType) -> Result<Vec<Graph>> {
                match self { $($(AnyModel::$Model(m) => m.inventory(dtype),)+)+ }
            }
        }

        /// All classes that can be read.
        pub const CLASSES: &[&[&str]] = &[$($($Model::CLASSES,)+)+];
    };
}
models!(define);

pub use autoencoder::{Codec, Encoded};
pub use patchgan::{PatchNorm, Statistics};
