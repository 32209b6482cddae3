//! One error type. Every message says what failed, where, what was expected, what was found, and what to do.

use std::path::{Path, PathBuf};

/// What the engine's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, with the names a reader needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation was given shapes or types that it does not take.
    #[error("{op}{}: want {want}; got {got}", at(.node))]
    Shape {
        /// Room name, such as `conv2d`.
        op: &'static str,
        /// Node label, such as `unet.mid.resnets.0.conv1`; empty while the graph is being built without one.
        node: String,
        /// The shape rule in letters.
        want: String,
        /// The shapes that came.
        got: String,
    },
    /// A tensor of a checkpoint is missing, surplus, misshapen, of a wrong type, or not finite.
    #[error("{}: tensor `{name}`: want {want}; got {got}", .file.display())]
    Tensor {
        /// The file or folder that was read.
        file: PathBuf,
        /// The tensor's name in the file.
        name: String,
        /// What the model needs.
        want: String,
        /// What is there.
        got: String,
    },
    /// A value in a configuration file or in a preset that the engine does not know.
    #[error("{}: `{key}`: want {want}; got {got}", .file.display())]
    Config {
        /// The configuration file.
        file: PathBuf,
        /// Key, dotted where it is nested.
        key: String,
        /// The values that are understood.
        want: String,
        /// The value found.
        got: String,
    },
    /// A file that cannot be read, parsed or written.
    #[error("{}: {what}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// A request that cannot be met as it stands: an argument, a size, a prompt.
    #[error("{0}")]
    Invalid(String),
    /// The device is not there, or cannot run this build.
    #[error("{0}")]
    Device(String),
    /// A call of the CUDA driver failed.
    #[error("CUDA: {call} failed{}: {what}", at(.node))]
    Cuda {
        /// Driver function, or kernel with its grid.
        call: String,
        /// Node label, or empty.
        node: String,
        /// The driver's own words, and what to do.
        what: String,
    },
    /// A node produced NaN or infinity.
    #[error("non-finite value: {op}{} made {what}; no picture was written (try --dtype f32)", at(.node))]
    NonFinite {
        /// Room name.
        op: String,
        /// Node label.
        node: String,
        /// Which value and where.
        what: String,
    },
    /// The operation has no gradient rule.
    #[error("{0}: this operation has no gradient")]
    NoGradient(&'static str),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

fn at(node: &str) -> String {
    if node.is_empty() { String::new() } else { format!(" \"{node}\"") }
}

impl Error {
    /// A file error from anything printable.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Error {
        Error::File { path: path.as_ref().into(), what: what.to_string() }
    }

    /// An unusable request.
    pub fn invalid(what: impl Into<String>) -> Error {
        Error::Invalid(what.into())
    }

    /// The same error, with the label of the node at which it arose.
    pub fn at_node(mut self, label: &str) -> Error {
        match &mut self {
            Error::Shape { node, .. } | Error::Cuda { node, .. } | Error::NonFinite { node, .. }
                if node.is_empty() =>
            {
                *node = label.into()
            }
            _ => {}
        }
        self
    }

    /// Process exit code: 2 for a request that the user can correct, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Invalid(_) | Error::Config { .. } | Error::Device(_) => 2,
            _ => 1,
        }
    }
}
