//! A product for the kernel whose operands come as boxes of tensors (`kernels/conv2d_tma.cu`): which it takes, and the maps that it is
//! given. A map goes by the addresses of its launch; a recorded one keeps it.

use super::super::prelude::*;
use super::tensor_cores::k;
use crate::backend::cuda::Boxed;
use crate::kernels::conv2d_tma as tma;
use crate::kernels::{DevicePtr, TensorMap};

/// x and w of each segment, or w of each part: addresses, and how they lie.
type Operands = [Vec<(DevicePtr, Boxed)>; 2];

/// So many pixels in a row, counted along a picture's rows, as a rectangle: part of a row, whole rows of a picture, or whole pictures;
/// wherever a run of them begins whose length divides what is before it. Its width, height and number of pictures.
fn rectangle(pixels: usize, width: usize, height: usize) -> Option<[usize; 3]> {
    let rows = pixels / width;
    match (width % pixels, pixels % width) {
        (0, _) => Some([pixels, 1, 1]),
        (_, 0) if height % rows == 0 => Some([width, rows, 1]),
        (_, 0) if rows % height == 0 => Some([width, height, rows / height]),
        _ => None,
    }
}

/// The operands of a product in tiles of so many rows and columns, as the kernel by warps takes it; `None` where a tile is no box of x:
/// windows in steps, behind an upsampling in one, or of sizes that do not tile; or where there is no channel.
fn operands(p: &k::Conv2dMma, rows: usize, columns: usize) -> Option<Operands> {
    let size = |n: i32| usize::try_from(n).unwrap_or(0);
    let (m, o, h, w) = (size(p.m), size(p.o), size(p.h), size(p.w_));
    let plain = |c: usize| Boxed { extents: [c, m, 1, 1], strides: [c, m * c, m * c], part: [k::BK, rows, 1, 1] };
    let window = |c: usize| {
        let (phases, images) = (p.phases != 0, m / (size(p.out_h) * size(p.out_w)));
        let (width, height) = if phases { (w, h) } else { (size(p.out_w), size(p.out_h)) };
        let [x, y, z] = rectangle(rows, width, height).filter(|_| phases || (p.stride == 1 && p.upsample == 0))?;
        Some(Boxed { extents: [c, w, h, images], strides: [c, w * c, h * w * c], part: [k::BK, x, y, z] })
    };
    let (glu, part, phases) = (p.glu != 0, size(p.part), if p.phases != 0 { 4 } else { 1 });
    let weight = |c: usize, row: i32, tap: i32, taps: usize| {
        let (row, tap, o) = (size(row), size(tap), if part > 0 { part } else { o });
        if glu {
            // The third axis is a shorter step than the second, which the driver's documentation does not show and known kernels do.
            let strides = [row, o * row, 8 * row];
            return Boxed { extents: [c, 8, 2, o / 8], strides, part: [k::BK, 8, 2, columns / 16] };
        }
        let strides = [if taps == 1 { row } else { tap }, row, o * row];
        Boxed { extents: [c, taps, o, phases], strides, part: [k::BK, 1, columns, 1] }
    };
    let segments = [
        (p.x, p.c, p.flat, p.w, p.w_row, p.w_tap),
        (p.x1, p.c1, p.flat1, p.w1, p.w_row1, p.w_tap1),
        (p.x2, p.c2, 1, p.w2, p.w_row2, 0),
    ];
    let (mut xs, mut ws) = (vec![], vec![]);
    for (x, c, flat, w, row, tap) in segments.into_iter().take(size(p.segments)) {
        let (c, taps) = (size(c), if flat != 0 { 1 } else { size(p.kh) * size(p.kw) });
        if c == 0 {
            return None;
        }
        xs.push((x, if flat != 0 { plain(c) } else { window(c)? }));
        ws.push((w, weight(c, row, tap, taps)));
    }
    if part > 0 {
        ws = [p.w, p.w1, p.w2].map(|at| (at, ws[0].1)).into();
    }
    Some([xs, ws])
}

/// The arguments of the kernel that does the same with boxes; `None` where it does not take this product.
///
/// # Errors
/// When the driver refuses a map.
pub(super) fn of_boxes(
    p: &k::Conv2dMma,
    rows: usize,
    columns: usize,
    io: &cuda::Call,
) -> Result<Option<tma::Conv2dTma>> {
    let Some(operands) = operands(p, rows, columns) else { return Ok(None) };
    let mut maps = [[TensorMap::default(); 3]; 2];
    for (to, from) in maps.iter_mut().zip(&operands) {
        for (to, (at, tensor)) in to.iter_mut().zip(from) {
            *to = io.tensor_map(*at, io.y_spec(0).dtype, tensor)?;
        }
    }
    let [[xs, xs1, xs2], [ws, ws1, ws2]] = maps;
    macro_rules! same {
        ($($field:ident)*) => { tma::Conv2dTma { xs, xs1, xs2, ws, ws1, ws2, $($field: p.$field),* } };
    }
    Ok(Some(same!(
        y bias bias1 time counter residual stats partial counters m o h w_ c kh kw out_h out_w stride top left flat c1 flat1 c2
        segments blocks part time_rows act glu phases
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_a_rectangle_of_pixels_where_one_fits() {
        for (rows, width, height, want) in [
            (128, 512, 512, Some([128, 1, 1])),
            (128, 64, 64, Some([64, 2, 1])),
            (64, 64, 64, Some([64, 1, 1])),
            (128, 16, 16, Some([16, 8, 1])),
            (128, 8, 8, Some([8, 8, 2])),
            (64, 4, 4, Some([4, 4, 4])),
            (128, 16, 5, None),
            (128, 8, 5, None),
            (128, 96, 96, None),
            (64, 24, 8, None),
        ] {
            assert_eq!(rectangle(rows, width, height), want, "{rows} of {width}×{height}");
            // Runs follow each other without a gap or a pixel twice.
            if let Some([x, y, z]) = want {
                assert!(x * y * z == rows && (x == width || y == 1) && (y == height || z == 1));
            }
        }
    }

    fn conv() -> k::Conv2dMma {
        k::Conv2dMma {
            x: DevicePtr(1 << 20),
            w: DevicePtr(2 << 20),
            w1: DevicePtr(3 << 20),
            w2: DevicePtr(4 << 20),
            m: 2 * 16 * 16,
            o: 320,
            h: 16,
            w_: 16,
            c: 72,
            kh: 3,
            kw: 3,
            out_h: 16,
            out_w: 16,
            stride: 1,
            w_row: 9 * 72,
            w_tap: 72,
            segments: 1,
            ..Default::default()
        }
    }

    #[test]
    fn maps_of_a_window_of_phases_of_gates_and_of_parts() {
        let [x, w] = operands(&conv(), 128, 160).unwrap();
        let boxed = |extents, strides, part| Boxed { extents, strides, part };
        assert_eq!(x, [(DevicePtr(1 << 20), boxed([72, 16, 16, 2], [72, 1152, 18432], [64, 16, 8, 1]))]);
        assert_eq!(w, [(DevicePtr(2 << 20), boxed([72, 9, 320, 1], [72, 648, 207_360], [64, 1, 160, 1]))]);
        let phases = k::Conv2dMma { phases: 1, kh: 2, kw: 2, w_row: 288, out_h: 32, out_w: 32, m: 2048, ..conv() };
        let [x, w] = operands(&phases, 64, 80).unwrap();
        assert_eq!(x[0].1, boxed([72, 16, 16, 2], [72, 1152, 18432], [64, 16, 4, 1]));
        assert_eq!(w[0].1, boxed([72, 4, 320, 4], [72, 288, 92160], [64, 1, 80, 1]));
        let flat = k::Conv2dMma { flat: 1, kh: 1, kw: 1, h: 0, w_: 0, stride: 0, w_row: 72, m: 100, ..conv() };
        let [x, w] = operands(&k::Conv2dMma { glu: 1, ..flat }, 128, 160).unwrap();
        assert_eq!(x[0].1, boxed([72, 100, 1, 1], [72, 7200, 7200], [64, 128, 1, 1]));
        assert_eq!(w[0].1, boxed([72, 8, 2, 40], [72, 23040, 576], [64, 8, 2, 10]));
        let [x, w] = operands(&k::Conv2dMma { part: 320, o: 960, ..flat }, 128, 160).unwrap();
        assert_eq!((x.len(), w.len()), (1, 3));
        let own = boxed([72, 1, 320, 1], [72, 72, 23040], [64, 1, 160, 1]);
        assert_eq!(w, [2, 3, 4].map(|i| (DevicePtr(i << 20), own)));
    }

    #[test]
    fn a_shortcut_has_maps_of_its_own_and_what_is_no_box_none() {
        let two = k::Conv2dMma { segments: 3, c1: 24, w_row1: 64, flat1: 1, c2: 40, w_row2: 64, ..conv() };
        let [x, w] = operands(&two, 128, 160).unwrap();
        assert_eq!((x[1].1.extents, x[2].1.extents), ([24, 512, 1, 1], [40, 512, 1, 1]));
        assert_eq!((w[1].1.strides, w[2].1.strides), ([64, 64, 20480], [64, 64, 20480]));
        for other in [
            k::Conv2dMma { stride: 2, ..conv() },
            k::Conv2dMma { c: 0, ..conv() },
            k::Conv2dMma { upsample: 1, ..conv() },
            k::Conv2dMma { out_w: 15, ..conv() },
            k::Conv2dMma { out_h: 12, ..conv() },
        ] {
            assert_eq!(operands(&other, 128, 160), None, "{other:?}");
        }
    }
}
