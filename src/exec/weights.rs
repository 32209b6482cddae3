//! Memory on a device, and the weights that lie in it.

use super::Device;
use crate::backend::cpu::{Memory, Slice, gemm::PackedLayout};
use crate::backend::cuda;
use crate::error::{Error, Result};
use crate::tensor::{HostTensor, Spec};
use std::collections::HashMap;
use std::sync::Arc;

/// Memory on a device.
pub(super) enum Store {
    Host(Memory),
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
            (Store::Host(m), _) => HostTensor::from_bytes(spec, &m.bytes()[offset..offset + spec.bytes()]),
            (Store::Cuda(b), Device::Cuda(c)) => {
                let mut bytes = vec![0; spec.bytes()];
                c.download(b, offset, &mut bytes)?;
                HostTensor::from_bytes(spec, &bytes)
            }
            _ => Err(Error::Device("memory of another device".into())),
        }
    }
}

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
        let dims = tensor.shape();
        if matches!(self.device, Device::Cpu)
            && (dims.len() == 4 || dims.len() == 2 && !name.contains("embed"))
        {
            let layout = PackedLayout::new(tensor.spec().dtype, dims[0], dims[1..].iter().product());
            let mut memory = Memory::new(layout.bytes())?;
            if let Some(x) = Slice::of(tensor.spec().dtype, tensor.bytes()) {
                layout.pack(x, &mut memory.bytes_mut()[..layout.bytes()]);
            }
            self.map.insert(name.into(), Arc::new((tensor.spec(), Store::Packed(layout, memory))));
            return Ok(());
        }
        let mut store = Store::new(&self.device, tensor.bytes().len())?;
        store.write(&self.device, 0, tensor.bytes())?;
        self.map.insert(name.into(), Arc::new((tensor.spec(), store)));
        Ok(())
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
