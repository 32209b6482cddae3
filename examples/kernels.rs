//! Lists what each compiled kernel needs: registers, shared memory, stack, spills. Fails if one uses local memory.

use std::process::ExitCode;

fn main() -> ExitCode {
    print!("{}", ldm::kernels::report());
    ExitCode::from(u8::from(!ldm::kernels::spilling().is_empty()))
}
