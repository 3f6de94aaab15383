//! Gets entries agreed, keeps them, and hands them to the state.

pub mod data_dir;
pub mod identity;
