//! Several pictures as one.

use crate::error::Result;
use crate::io::png;
use std::path::Path;

/// Pictures of one size, in rows.
pub(super) struct Tiles {
    pub(super) columns: usize,
    pub(super) width: usize,
    pub(super) height: usize,
    /// Shape (height, width, 3) each.
    pub(super) pictures: Vec<Vec<u8>>,
}

/// Pixels between two pictures.
const GAP: usize = 2;

impl Tiles {
    /// Writes them as one picture, on white.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let columns = self.columns.clamp(1, self.pictures.len().max(1));
        let rows = self.pictures.len().div_ceil(columns).max(1);
        let (width, height) = (columns * (self.width + GAP) + GAP, rows * (self.height + GAP) + GAP);
        let mut all = vec![255; width * height * 3];
        for (i, picture) in self.pictures.iter().enumerate() {
            let (left, top) =
                (GAP + i % columns * (self.width + GAP), GAP + i / columns * (self.height + GAP));
            for (y, row) in picture.chunks(self.width * 3).enumerate() {
                all[((top + y) * width + left) * 3..][..row.len()].copy_from_slice(row);
            }
        }
        png::write_rgb8(path, width, height, &all, None)
    }
}

/// −1…1 to bytes.
pub(super) fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8).collect()
}
