//! Permissions: what a set of joined ranges covers is what checking each key says.
//!
//! The reference knows no joined ranges. It looks at single keys: all those at which anything can change are the bounds of the
//! granted and requested ranges, and the first key after each of them.

use metastore::{
    auth::permission::{self, OPEN_END, Permissions},
    proto::authpb::{Permission, permission::Type},
};

use super::input::Input;

const MAX_PERMISSIONS: usize = 24;
const MAX_REQUESTS: usize = 24;
/// Few different bytes, so that ranges meet often.
const BYTES: [u8; 5] = [0, 1, b'a', b'b', 0xff];

/// Decisions: whether the user has the role root, permissions, then requests.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let is_root = input.byte() == 255;
    let granted = (0..input.below(MAX_PERMISSIONS)).map(|_| permission(&mut input)).filter(permission::is_valid);
    let granted: Vec<Permission> = granted.collect();
    let permissions = Permissions::merge(is_root, &granted);
    for _ in 0..MAX_REQUESTS {
        if input.is_empty() {
            break;
        }
        let (key, end) = (key(&mut input), key(&mut input));
        let expected = |allowing: [Type; 2]| {
            let kinds = allowing.map(|kind| kind as i32);
            let ranges = granted.iter().filter(|permission| kinds.contains(&permission.perm_type));
            is_root || is_covered(&ranges.collect::<Vec<_>>(), &key, &end)
        };
        let (may_read, may_write) = (expected([Type::Read, Type::Readwrite]), expected([Type::Write, Type::Readwrite]));
        let context = || format!("{key:?} to {end:?}, granted {granted:?}");
        assert_eq!(permissions.may_read(&key, &end), may_read, "read {}", context());
        assert_eq!(permissions.may_write(&key, &end), may_write, "write {}", context());
    }
}

fn key(input: &mut Input<'_>) -> Vec<u8> {
    (0..input.below(5)).map(|_| input.pick(&BYTES)).collect()
}

fn permission(input: &mut Input<'_>) -> Permission {
    Permission {
        perm_type: i32::from(input.byte() % 4), // The last one is no type.
        key: key(input).into(),
        range_end: key(input).into(),
    }
}

/// Whether a key is in a range, by definition.
fn is_in(tried: &[u8], key: &[u8], end: &[u8]) -> bool {
    match end {
        [] => tried == key,
        OPEN_END => tried >= key,
        _ => tried >= key && tried < end,
    }
}

fn is_covered(granted: &[&Permission], key: &[u8], end: &[u8]) -> bool {
    let holds = |tried: &[u8]| granted.iter().any(|granted| is_in(tried, &granted.key, &granted.range_end));
    if end != OPEN_END && end <= key {
        return holds(key); // One key, or a range without any: its beginning decides.
    }
    let bounds = granted.iter().flat_map(|granted| [granted.key.as_ref(), granted.range_end.as_ref()]);
    let bounds: Vec<&[u8]> = bounds.chain([key, end]).collect();
    let after = bounds.iter().map(|bound| [bound, &[0][..]].concat());
    let beyond_all = vec![0xff; 8];
    let tried = bounds.iter().map(|bound| bound.to_vec()).chain(after).chain([beyond_all]);
    tried.filter(|tried| is_in(tried, key, end)).all(|tried| holds(&tried))
}

/// Decisions that grant many ranges and ask for many.
pub fn seeds() -> Vec<Vec<u8>> {
    let decisions = |factor: u8| (0..=255_u8).map(|byte| byte.wrapping_mul(factor) ^ 0x33).collect();
    // Two ranges that touch, and a request for both.
    let touching = vec![0, 2, 0, 1, 2, 1, 3, 0, 1, 3, 1, 4, 1, 2, 1, 4];
    vec![decisions(37), decisions(101), touching]
}
