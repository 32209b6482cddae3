//! Data to train on and to judge by: a world of drawn shapes, its recogniser and scores, folders of pictures, and the loader
//! that makes batches of either.

pub mod folder;
pub mod loader;
pub mod mask;
pub mod outline;
pub mod prompt;
pub mod quality;
pub mod recognise;
pub mod score;
pub mod shapes;
pub mod source;
pub mod transform;
