//! Gets entries agreed, keeps them, and hands them to the state.

pub mod identity;
