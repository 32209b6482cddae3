//! Memory on a device, and the weights that lie in it.

use super::Device;
use crate::backend::cpu::gemm::{Packed, PackedLayout};
use crate::backend::cpu::{Slice, with_scratch};
use crate::backend::{Memory, cuda};
use crate::error::{Error, Result};
use crate::graph::{Layout, Target};
use crate::tensor::{DType, HostTensor, Spec};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Memory on a device.
pub(super) enum Store {
    Host(Memory),
    /// A weight in the order in which the CPU's products read it.
    Packed(PackedLayout, Memory),
    Cuda(cuda::Buffer),
}

impl Store {
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Store> {
        match device {
            Device::Cpu => Ok(Store::Host(Memory::new(bytes)?)),
            Device::Cuda(c) => Ok(Store::Cuda(c.alloc(bytes.max(1))?)),
        }
    }

    pub(super) fn write(&mut self, device: &Device, offset: usize, bytes: &[u8]) -> Result<()> {
        match (self, device) {
            (Store::Host(m), _) => m.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes),
            (Store::Cuda(b), Device::Cuda(c)) => c.upload(b, offset, bytes)?,
            _ => return Err(Error::Device("memory of another device".into())),
        }
        Ok(())
    }

    pub(super) fn read(&self, device: &Device, offset: usize, spec: Spec) -> Result<HostTensor> {
        match (self, device) {
            (Store::Host(m), _) => HostTensor::from_bytes(spec, &m.bytes()[offset..][..spec.bytes()]),
            (Store::Packed(layout, m), _) => {
                let packed = Packed::new(*layout, &m.bytes()[..layout.bytes()]);
                HostTensor::from_bytes(spec, &packed.unpack()[offset..][..spec.bytes()])
            }
            (Store::Cuda(b), Device::Cuda(c)) => {
                let mut bytes = vec![0; spec.bytes()];
                c.download(b, offset, &mut bytes)?;
                HostTensor::from_bytes(spec, &bytes)
            }
            _ => Err(Error::Device("memory of another device".into())),
        }
    }
}

/// Bytes that one thread converts at a time: enough to be worth a task, few enough to stay in its cache.
const PART: usize = 1 << 20;
/// Bytes on their way to a GPU.
const STAGED: usize = 32 << 20;

/// A weight on a device, without a name yet.
pub struct Made(Arc<(Spec, Store)>);

/// Weights on a device, by name: immutable, shared by programs.
#[derive(Clone)]
pub struct Weights {
    device: Device,
    map: HashMap<String, Arc<(Spec, Store)>>,
}

impl Weights {
    /// No weights yet.
    pub fn new(device: &Device) -> Weights {
        Weights { device: device.clone(), map: HashMap::new() }
    }

    /// Puts a tensor on the device.
    ///
    /// # Errors
    /// When the device has no room for it.
    pub fn insert(&mut self, name: &str, tensor: &HostTensor) -> Result<()> {
        self.insert_as(name, tensor, Layout::Same)
    }

    /// [`Weights::insert`] of a tensor that lies as the engine holds a weight of this layout: a convolution's is
    /// (O,KH,KW,I).
    ///
    /// # Errors
    /// As there.
    pub fn insert_as(&mut self, name: &str, tensor: &HostTensor, layout: Layout) -> Result<()> {
        let bytes = tensor.bytes();
        let row = bytes.len() / rows(tensor.spec()).max(1);
        self.insert_with(name, tensor.spec(), layout, |rows, out| {
            out.copy_from_slice(&bytes[rows.start * row..rows.end * row]);
            Ok(())
        })
    }

    /// Puts a weight on the device that `fill` makes there: see [`Weights::make`].
    ///
    /// # Errors
    /// As there.
    pub fn insert_with(
        &mut self,
        name: &str,
        spec: Spec,
        layout: Layout,
        fill: impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let made = self.make(spec, layout, fill)?;
        self.put(name, made);
        Ok(())
    }

    /// Makes a weight on the device, for [`Weights::put`]; several threads may make several. `fill` is asked for rows of
    /// the outermost axis, in type and axes of `spec`, into bytes of just their size that are aligned to the type.
    /// Several threads call it at once, each row once; nothing is held twice.
    ///
    /// # Errors
    /// When the device has no room for it; the error of the first rows that `fill` fails on.
    pub fn make(
        &self,
        spec: Spec,
        layout: Layout,
        fill: impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<Made> {
        let (count, bytes) = (rows(spec), spec.bytes());
        let row = bytes / count.max(1);
        let store = match (&self.device, packed(spec, layout)) {
            (Device::Cpu, Some(packed)) => {
                let mut memory = Memory::new(packed.bytes())?;
                fill_panels(&packed, &mut memory.bytes_mut()[..packed.bytes()], row, &fill)?;
                Store::Packed(packed, memory)
            }
            (Device::Cpu, None) => {
                let mut memory = Memory::new(bytes)?;
                fill_in_parts(0, &mut memory.bytes_mut()[..bytes], row, &fill)?;
                Store::Host(memory)
            }
            (Device::Cuda(c), _) => {
                let buffer = c.alloc(bytes.max(1))?;
                let most = (STAGED / row.max(1)).max(1);
                let mut staged = Memory::new(bytes.min(most.saturating_mul(row)))?;
                for first in (0..count).step_by(most) {
                    let part = &mut staged.bytes_mut()[..most.min(count - first) * row];
                    fill_in_parts(first, part, row, &fill)?;
                    c.upload(&buffer, first * row, part)?;
                }
                Store::Cuda(buffer)
            }
        };
        Ok(Made(Arc::new((spec, store))))
    }

    /// Gives a weight its name.
    pub fn put(&mut self, name: &str, weight: Made) {
        self.map.insert(name.into(), weight.0);
    }

    /// Bytes that a weight takes on a device.
    pub fn measure(target: Target, spec: Spec, layout: Layout) -> usize {
        match target {
            Target::Cpu => Memory::measure(packed(spec, layout).map_or(spec.bytes(), |p| p.bytes())),
            Target::Cuda => spec.bytes(),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<(Spec, Store)>> {
        self.map.get(name)
    }

    /// Whether a weight is there.
    pub fn contains(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> usize {
        self.map.values().map(|w| w.0.bytes()).sum()
    }
}

/// Length of the outermost axis.
fn rows(spec: Spec) -> usize {
    spec.shape.first().copied().unwrap_or(1)
}

/// How the CPU packs a weight: those of products, and nothing else.
fn packed(spec: Spec, layout: Layout) -> Option<PackedLayout> {
    let product = layout != Layout::Same && DType::FLOATS.contains(&spec.dtype) && spec.shape.numel() > 0;
    product.then(|| PackedLayout::new(spec.dtype, rows(spec), spec.shape.numel() / rows(spec)))
}

/// Lets the threads fill panels, each the rows of one at a time.
fn fill_panels(
    layout: &PackedLayout,
    out: &mut [u8],
    row: usize,
    fill: &(impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync),
) -> Result<()> {
    let panel = |(i, out): (usize, &mut [u8])| {
        let rows = layout.rows(i);
        let bytes = rows.len() * row;
        with_scratch(bytes.div_ceil(size_of::<f32>()), |buffer| {
            let source = &mut bytemuck::cast_slice_mut(buffer)[..bytes];
            fill(rows, source)?;
            let source = Slice::of(layout.dtype(), source);
            let source = source.ok_or_else(|| Error::invalid("a packed weight of integers"))?;
            layout.pack_panel(i, source, out);
            Ok(())
        })
    };
    if out.len() <= PART {
        return out.chunks_mut(layout.panel_bytes()).enumerate().try_for_each(panel);
    }
    // In order, so that the same fault is the first one each time.
    let done: Vec<Result<()>> = out.par_chunks_mut(layout.panel_bytes()).enumerate().map(panel).collect();
    done.into_iter().collect()
}

/// Lets the threads fill rows from `first` on, each a part at a time.
fn fill_in_parts(
    first: usize,
    out: &mut [u8],
    row: usize,
    fill: &(impl Fn(Range<usize>, &mut [u8]) -> Result<()> + Sync),
) -> Result<()> {
    if row == 0 || out.is_empty() {
        return Ok(());
    }
    let most = (PART / row).max(1);
    let part = |(i, out): (usize, &mut [u8])| {
        let start = first + i * most;
        fill(start..start + out.len() / row, out)
    };
    if out.len() <= most * row {
        return part((0, out));
    }
    // In order, so that the same fault is the first one each time.
    let done: Vec<Result<()>> = out.par_chunks_mut(most * row).enumerate().map(part).collect();
    done.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn every_row_is_made_once_and_the_first_fault_is_told() {
        let spec = Spec::new(DType::F32, [1000, 3000]);
        let seen = Mutex::new(vec![0; 1000]);
        let mut weights = Weights::new(&Device::Cpu);
        let fill = |rows: Range<usize>, out: &mut [u8]| {
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            assert_eq!(out.len(), rows.len() * 3000);
            rows.clone().for_each(|r| seen.lock().unwrap()[r] += 1);
            out.chunks_mut(3000).zip(rows).for_each(|(row, r)| row.fill(r as f32));
            Ok(())
        };
        weights.insert_with("w", spec, Layout::Linear, fill).unwrap();
        assert!(seen.lock().unwrap().iter().all(|&n| n == 1));
        let w = weights.get("w").unwrap().1.read(&Device::Cpu, 0, spec).unwrap().to_f32();
        assert!(w.chunks(3000).enumerate().all(|(r, row)| row.iter().all(|&v| v == r as f32)));
        assert_eq!(weights.bytes(), 12_000_000);

        let faulty = |rows: Range<usize>, _: &mut [u8]| match rows.end > 400 {
            true => Err(Error::invalid(rows.start.max(400).to_string())),
            false => Ok(()),
        };
        for _ in 0..20 {
            let e = weights.insert_with("v", spec, Layout::Same, faulty).unwrap_err().to_string();
            assert!(e.contains("400") && !weights.contains("v"), "{e}");
        }
    }

    #[test]
    fn tensors_of_any_shape_are_held() {
        let mut weights = Weights::new(&Device::Cpu);
        for shape in [&[][..], &[0, 3], &[3, 0], &[5], &[2, 3, 4]] {
            let t = HostTensor::zeros(Spec::new(DType::BF16, shape));
            weights.insert("t", &t).unwrap();
            assert_eq!(weights.get("t").unwrap().1.read(&Device::Cpu, 0, t.spec()).unwrap(), t);
        }
    }
}
