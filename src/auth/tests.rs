use super::*;
use crate::{
    proto::authpb::{Permission, UserAddOptions, permission::Type},
    storage::memory::Memory,
};

/// Tables in a database, changed by root.
struct Tables {
    auth: Auth,
    engine: Memory,
}

impl Tables {
    fn new() -> Self {
        Self { auth: Auth::default(), engine: Memory::default() }
    }

    /// With authentication enabled.
    fn enabled() -> Self {
        let mut tables = Self::new();
        tables.ok(add_user(ROOT));
        tables.ok(grant(ROOT, ROOT));
        tables.ok(Change::Enable);
        tables
    }

    fn apply(&mut self, user: &str, change: Change) -> Result<Outcome, Error> {
        let mut batch = Batch::default();
        let requester = Requester { user, auth_revision: self.auth.revision };
        let before = self.auth.clone();
        let outcome = self.auth.apply(&mut batch, requester, change, 7);
        self.engine.write(&batch).unwrap();
        if outcome.is_err() {
            assert!(batch.is_empty(), "a refused change writes nothing");
            assert_eq!((&self.auth.users, self.auth.revision), (&before.users, before.revision));
        }
        assert_restored(&self.auth, &self.engine);
        outcome
    }

    fn ok(&mut self, change: Change) -> Outcome {
        self.apply(ROOT, change).unwrap()
    }

    fn refused(&mut self, change: Change) -> Error {
        self.apply(ROOT, change).unwrap_err()
    }
}

/// FAULT-2: after every change a restart finds the same.
fn assert_restored(auth: &Auth, engine: &Memory) {
    let read = Auth::read(engine).unwrap();
    assert_eq!((read.enabled, read.revision), (auth.enabled, auth.revision));
    assert_eq!((&read.users, &read.roles, &read.permissions), (&auth.users, &auth.roles, &auth.permissions));
}

fn add_user(name: &str) -> Change {
    Change::UserAdd(AuthUserAddRequest { name: name.into(), hashed_password: "aGFzaA==".into(), ..Default::default() })
}

fn add_role(name: &str) -> Change {
    Change::RoleAdd(AuthRoleAddRequest { name: name.into() })
}

fn grant(user: &str, role: &str) -> Change {
    Change::UserGrantRole(AuthUserGrantRoleRequest { user: user.into(), role: role.into() })
}

fn revoke(user: &str, role: &str) -> Change {
    Change::UserRevokeRole(AuthUserRevokeRoleRequest { name: user.into(), role: role.into() })
}

fn delete_user(name: &str) -> Change {
    Change::UserDelete(AuthUserDeleteRequest { name: name.into() })
}

fn delete_role(name: &str) -> Change {
    Change::RoleDelete(AuthRoleDeleteRequest { role: name.into() })
}

fn change_password(name: &str, hashed_password: &str) -> Change {
    let hashed_password = hashed_password.into();
    Change::UserChangePassword(AuthUserChangePasswordRequest {
        name: name.into(),
        hashed_password,
        ..Default::default()
    })
}

fn permit(role: &str, kind: Type, key: &str, range_end: &str) -> Change {
    let perm =
        Permission { perm_type: kind as i32, key: key.to_owned().into(), range_end: range_end.to_owned().into() };
    Change::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: role.into(), perm: Some(perm) })
}

fn forbid(role: &str, key: &str, range_end: &str) -> Change {
    let (key, range_end) = (key.to_owned().into(), range_end.to_owned().into());
    Change::RoleRevokePermission(AuthRoleRevokePermissionRequest { role: role.into(), key, range_end })
}

fn log_in(name: &str) -> Change {
    let simple_token = "letters".into();
    Change::Authenticate(InternalAuthenticateRequest { name: name.into(), simple_token, ..Default::default() })
}

fn revoked_of(name: &str) -> TokenEffect {
    TokenEffect::RevokedOf(name.into())
}

#[test]
fn authentication_is_enabled_once_root_has_the_role_root() {
    let mut tables = Tables::new();
    assert_eq!(tables.refused(Change::Enable), Error::RootUserNotExist);
    tables.ok(add_user(ROOT));
    assert_eq!(tables.refused(Change::Enable), Error::RootRoleNotExist);
    tables.ok(grant(ROOT, ROOT)); // The role needs no table entry.
    let before = tables.auth.revision();
    tables.ok(Change::Enable);
    tables.ok(Change::Enable);
    assert_eq!((tables.auth.is_enabled(), tables.auth.revision()), (true, before), "enabling counts as no change");
    let disabled = tables.ok(Change::Disable);
    assert_eq!(disabled.effect, Some(TokenEffect::AllRevoked));
    assert_eq!((tables.auth.is_enabled(), tables.auth.revision()), (false, before + 1));
    assert_eq!(tables.ok(Change::Disable), Outcome::default());
    assert_eq!(tables.auth.revision(), before + 1);
}

#[test]
fn every_change_of_users_and_roles_counts_once() {
    let mut tables = Tables::new();
    assert_eq!(tables.auth.revision(), 1);
    let changes = [
        (add_user("ann"), 2),
        (add_role("reader"), 3),
        (permit("reader", Type::Read, "a", ""), 4),
        (grant("ann", "reader"), 5),
        (grant("ann", "reader"), 5), // It has the role already.
        (change_password("ann", "bmV3"), 6),
        (forbid("reader", "a", ""), 7),
        (revoke("ann", "reader"), 8),
        (delete_role("reader"), 9),
        (delete_user("ann"), 10),
    ];
    for (change, revision) in changes {
        tables.ok(change.clone());
        assert_eq!(tables.auth.revision(), revision, "{change:?}");
    }
}

#[test]
fn changes_are_refused_with_the_reason() {
    let mut tables = Tables::new();
    tables.ok(add_user("ann"));
    tables.ok(add_role("reader"));
    for (change, error) in [
        (add_user(""), Error::UserEmpty),
        (add_user("ann"), Error::UserAlreadyExist),
        (delete_user("bob"), Error::UserNotFound),
        (change_password("bob", ""), Error::UserNotFound),
        (change_password("ann", "%"), Error::NoPasswordUser),
        (grant("bob", "reader"), Error::UserNotFound),
        (grant("ann", "writer"), Error::RoleNotFound),
        (revoke("bob", "reader"), Error::UserNotFound),
        (revoke("ann", "reader"), Error::RoleNotGranted),
        (add_role(""), Error::RoleEmpty),
        (add_role("reader"), Error::RoleAlreadyExist),
        (delete_role("writer"), Error::RoleNotFound),
        (permit("writer", Type::Read, "a", ""), Error::RoleNotFound),
        (permit("reader", Type::Read, "", ""), Error::InvalidAuthManagement),
        (permit("reader", Type::Read, "b", "a"), Error::InvalidAuthManagement),
        (forbid("writer", "a", ""), Error::RoleNotFound),
        (forbid("reader", "a", ""), Error::PermissionNotGranted),
        (
            Change::RoleGrantPermission(AuthRoleGrantPermissionRequest { name: "reader".into(), perm: None }),
            Error::PermissionNotGiven,
        ),
        (log_in("ann"), Error::AuthNotEnabled),
    ] {
        assert_eq!(tables.refused(change.clone()), error, "{change:?}");
    }
}

#[test]
fn while_authentication_is_enabled_root_keeps_its_role() {
    let mut tables = Tables::enabled();
    tables.ok(add_role(ROOT));
    for change in [delete_user(ROOT), revoke(ROOT, ROOT), delete_role(ROOT)] {
        assert_eq!(tables.refused(change), Error::InvalidAuthManagement);
    }
    tables.ok(add_user("ann"));
    tables.ok(grant("ann", ROOT));
    tables.ok(revoke("ann", ROOT));
    tables.ok(Change::Disable);
    for change in [revoke(ROOT, ROOT), delete_role(ROOT), delete_user(ROOT)] {
        tables.ok(change);
    }
}

#[test]
fn only_root_makes_changes() {
    let mut tables = Tables::enabled();
    tables.ok(add_user("ann"));
    for (user, error) in [("", Error::UserEmpty), ("ann", Error::PermissionDenied), ("nobody", Error::UserNotFound)] {
        for change in [add_user("bob"), Change::Disable, Change::Enable, add_role("r"), change_password("ann", "")] {
            assert_eq!(tables.apply(user, change).unwrap_err(), error);
        }
    }
    tables.ok(grant("ann", ROOT));
    tables.apply("ann", add_user("bob")).unwrap();
}

#[test]
fn a_login_gets_a_token_that_names_its_entry() {
    let mut tables = Tables::enabled();
    tables.ok(add_user("ann"));
    let before = tables.auth.revision();
    let outcome = tables.apply("", log_in("ann")).unwrap();
    assert_eq!(outcome.token.as_deref(), Some("letters.7"));
    let issued = TokenEffect::Issued { user: "ann".into(), token: "letters.7".into() };
    assert_eq!((outcome.effect, tables.auth.revision()), (Some(issued), before));
    assert_eq!(tables.apply("", log_in("bob")).unwrap_err(), Error::AuthFailed);
    let without_token = Change::Authenticate(InternalAuthenticateRequest { name: "ann".into(), ..Default::default() });
    assert_eq!(tables.apply("", without_token).unwrap(), Outcome::default());
}

#[test]
fn tokens_end_with_the_password_and_the_user() {
    let mut tables = Tables::enabled();
    tables.ok(add_user("ann"));
    assert_eq!(tables.ok(change_password("ann", "")).effect, Some(revoked_of("ann")));
    assert_eq!(tables.ok(delete_user("ann")).effect, Some(revoked_of("ann")));
}

#[test]
fn a_user_without_password_keeps_none() {
    let mut tables = Tables::new();
    let options = Some(UserAddOptions { no_password: true });
    let request =
        AuthUserAddRequest { name: "ann".into(), hashed_password: "aGFzaA==".into(), options, ..Default::default() };
    tables.ok(Change::UserAdd(request));
    tables.ok(change_password("ann", "bmV3"));
    let user = tables.auth.user("ann").unwrap();
    assert!(has_no_password(user) && user.password.is_empty());
    tables.ok(add_user("bob"));
    assert_eq!(tables.auth.user("bob").unwrap().password, "hash");
}

#[test]
fn permissions_follow_roles_at_once() {
    let mut tables = Tables::enabled();
    for change in [add_user("ann"), add_role("r"), grant("ann", "r"), permit("r", Type::Readwrite, "a", "c")] {
        tables.ok(change);
    }
    let may_read = |tables: &Tables, key: &[u8]| {
        let requester = Requester { user: "ann", auth_revision: tables.auth.revision };
        tables.auth.permissions_of(requester).unwrap().unwrap().may_read(key, &[])
    };
    assert!(may_read(&tables, b"b"));
    tables.ok(permit("r", Type::Write, "a", "c")); // It replaces the one for the same range.
    assert!(!may_read(&tables, b"b"));
    tables.ok(permit("r", Type::Read, "b", ""));
    assert!(may_read(&tables, b"b") && !may_read(&tables, b"a"));
    tables.ok(forbid("r", "b", ""));
    assert!(!may_read(&tables, b"b"));
    tables.ok(permit("r", Type::Read, "b", ""));
    tables.ok(delete_role("r"));
    assert!(!may_read(&tables, b"b") && !tables.auth.has_role("ann", "r"));
}

#[test]
fn a_request_is_checked_at_the_present_auth_revision() {
    let mut tables = Tables::enabled();
    tables.ok(add_user("ann"));
    let now = tables.auth.revision();
    let check = |user, auth_revision| tables.auth.permissions_of(Requester { user, auth_revision }).map(|_| ());
    assert_eq!(check("ann", now), Ok(()));
    assert_eq!(check("ann", 0), Err(Error::UserEmpty));
    assert_eq!(check("ann", now - 1), Err(Error::AuthOldRevision));
    assert_eq!(check("nobody", now), Err(Error::PermissionDenied));
    tables.ok(Change::Disable);
    assert_eq!(tables.auth.permissions_of(Requester::default()).unwrap(), None, "then everything is allowed");
}
