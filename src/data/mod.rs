//! Data to train on and to judge by: a world of drawn shapes, its recogniser and scores, folders of pictures.

pub mod folder;
pub mod outline;
pub mod prompt;
pub mod recognise;
pub mod score;
pub mod shapes;
