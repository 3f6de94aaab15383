//! Users, roles and permissions: the replicated part of authentication.
//!
//! Users have roles, roles have permissions for ranges of keys. The role `root`, by its name, allows everything. The auth
//! revision counts the changes: a request carries the revision at which its user was identified, and is refused if anything has
//! changed since. Passwords arrive hashed; tokens are kept elsewhere, by each member for itself.
//!
//! INVARIANTS
//! * Same entries, same tables: what is decided here depends on nothing but these tables.
//! * While authentication is enabled, the user `root` exists and has the role `root`.

pub mod permission;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use prost::Message;

use crate::{
    error::{Error, Halt},
    proto::{
        authpb::{Role, User},
        etcdserverpb::{
            AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGrantPermissionRequest, AuthRoleRevokePermissionRequest,
            AuthUserAddRequest, AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGrantRoleRequest,
            AuthUserRevokeRoleRequest, InternalAuthenticateRequest,
        },
    },
    storage::{
        Batch, Engine, Table,
        schema::{decode_u64, meta},
    },
};
pub use permission::Permissions;

/// The name of the user, and of the role, that may do everything.
pub const ROOT: &str = "root";
/// The auth revision of a new cluster.
const FIRST_REVISION: u64 = 1;
/// The password hash of a new user arrives as text in this encoding.
const BASE64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

/// A change of users, roles or whether authentication is enabled; and logging in, which changes nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Enable,
    Disable,
    Authenticate(InternalAuthenticateRequest),
    UserAdd(AuthUserAddRequest),
    UserDelete(AuthUserDeleteRequest),
    UserChangePassword(AuthUserChangePasswordRequest),
    UserGrantRole(AuthUserGrantRoleRequest),
    UserRevokeRole(AuthUserRevokeRoleRequest),
    RoleAdd(AuthRoleAddRequest),
    RoleDelete(AuthRoleDeleteRequest),
    RoleGrantPermission(AuthRoleGrantPermissionRequest),
    RoleRevokePermission(AuthRoleRevokePermissionRequest),
}

/// What a change requires of the tokens that each member keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenEffect {
    /// This user has logged in, and got this token.
    Issued { user: String, token: String },
    /// The tokens of this user are no longer valid.
    RevokedOf(String),
    /// No token is valid any more.
    AllRevoked,
}

/// What a change leads to, besides the tables.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The token of a login.
    pub token: Option<String>,
    pub effect: Option<TokenEffect>,
}

/// On whose behalf a request is made: a user, and the auth revision at which it was identified.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Requester<'a> {
    /// Empty if the client has not logged in.
    pub user: &'a str,
    /// 0 if the client has not logged in.
    pub auth_revision: u64,
}

/// The tables of users and roles.
#[derive(Debug, Clone)]
pub struct Auth {
    enabled: bool,
    revision: u64,
    users: BTreeMap<String, Arc<User>>,
    roles: BTreeMap<String, Arc<Role>>,
    /// What each user may do: derived from the other tables.
    permissions: BTreeMap<String, Arc<Permissions>>,
}

impl Default for Auth {
    fn default() -> Self {
        Self {
            enabled: false,
            revision: FIRST_REVISION,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
            permissions: BTreeMap::new(),
        }
    }
}

impl Auth {
    /// Reads the tables from a database.
    pub fn read(engine: &dyn Engine) -> Result<Self, Halt> {
        let mut auth = Self::default();
        let mut damaged = false;
        engine.scan(Table::User, &[], &[], &mut |_, value| {
            match User::decode(value).map(|user| (text(&user.name), user)) {
                Ok((Some(name), user)) => _ = auth.users.insert(name, Arc::new(user)),
                Ok((None, _)) | Err(_) => damaged = true,
            }
            ControlFlow::Continue(())
        })?;
        engine.scan(Table::Role, &[], &[], &mut |_, value| {
            match Role::decode(value).map(|role| (text(&role.name), role)) {
                Ok((Some(name), role)) => _ = auth.roles.insert(name, Arc::new(role)),
                Ok((None, _)) | Err(_) => damaged = true,
            }
            ControlFlow::Continue(())
        })?;
        auth.enabled = engine.get(Table::Meta, meta::AUTH_ENABLED)?.is_some_and(|stored| stored.as_ref() == [1]);
        if let Some(stored) = engine.get(Table::Meta, meta::AUTH_REVISION)? {
            damaged |= decode_u64(&stored).map(|revision| auth.revision = revision).is_none();
        }
        if damaged {
            return Err(Halt::InvalidData("the database is corrupt: cannot decode the users and roles".into()));
        }
        let names: Vec<String> = auth.users.keys().cloned().collect();
        for name in &names {
            auth.merge_permissions(name);
        }
        Ok(auth)
    }

    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Counts the changes of users and roles.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    #[must_use]
    pub fn user(&self, name: &str) -> Option<&Arc<User>> {
        self.users.get(name)
    }

    #[must_use]
    pub fn role(&self, name: &str) -> Option<&Arc<Role>> {
        self.roles.get(name)
    }

    /// The names of all users, ascending.
    pub fn users(&self) -> impl Iterator<Item = &String> {
        self.users.keys()
    }

    /// The names of all roles, ascending.
    pub fn roles(&self) -> impl Iterator<Item = &String> {
        self.roles.keys()
    }

    /// What a user may do with keys; None if authentication is disabled, which allows everything.
    pub fn permissions_of(&self, requester: Requester<'_>) -> Result<Option<&Arc<Permissions>>, Error> {
        if !self.enabled {
            return Ok(None);
        }
        if requester.auth_revision == 0 {
            return Err(Error::UserEmpty);
        }
        if requester.auth_revision < self.revision {
            return Err(Error::AuthOldRevision);
        }
        self.permissions.get(requester.user).map(Some).ok_or(Error::PermissionDenied)
    }

    /// Whether a user may manage users and the cluster.
    pub fn check_root(&self, requester: Requester<'_>) -> Result<(), Error> {
        if !self.enabled {
            return Ok(());
        }
        if requester.user.is_empty() {
            return Err(Error::UserEmpty);
        }
        let permissions = self.permissions.get(requester.user).ok_or(Error::UserNotFound)?;
        if permissions.is_root { Ok(()) } else { Err(Error::PermissionDenied) }
    }

    /// Whether a user has a role.
    #[must_use]
    pub fn has_role(&self, user: &str, role: &str) -> bool {
        self.users.get(user).is_some_and(|user| user.roles.iter().any(|held| held == role))
    }

    /// Makes a change, which has index `index` in the log; a refused one changes nothing. All but logging in need root.
    pub fn apply(
        &mut self,
        batch: &mut Batch,
        requester: Requester<'_>,
        change: Change,
        index: u64,
    ) -> Result<Outcome, Error> {
        if !matches!(change, Change::Authenticate(_)) {
            self.check_root(requester)?;
        }
        match change {
            Change::Enable => self.enable(batch).map(|()| Outcome::default()),
            Change::Disable => Ok(self.disable(batch)),
            Change::Authenticate(request) => self.authenticate(request, index),
            Change::UserAdd(request) => self.add_user(batch, request),
            Change::UserDelete(request) => self.delete_user(batch, request.name),
            Change::UserChangePassword(request) => self.change_password(batch, request),
            Change::UserGrantRole(request) => self.grant_role(batch, &request.user, request.role),
            Change::UserRevokeRole(request) => self.revoke_role(batch, &request.name, &request.role),
            Change::RoleAdd(request) => self.add_role(batch, request.name),
            Change::RoleDelete(request) => self.delete_role(batch, &request.role),
            Change::RoleGrantPermission(request) => self.grant_permission(batch, request),
            Change::RoleRevokePermission(request) => self.revoke_permission(batch, &request),
        }
    }

    fn enable(&mut self, batch: &mut Batch) -> Result<(), Error> {
        if self.enabled {
            return Ok(());
        }
        let root = self.users.get(ROOT).ok_or(Error::RootUserNotExist)?;
        if !root.roles.iter().any(|role| role == ROOT) {
            return Err(Error::RootRoleNotExist);
        }
        self.enabled = true;
        batch.put(Table::Meta, meta::AUTH_ENABLED, vec![1]);
        Ok(())
    }

    fn disable(&mut self, batch: &mut Batch) -> Outcome {
        if !self.enabled {
            return Outcome::default();
        }
        self.enabled = false;
        batch.put(Table::Meta, meta::AUTH_ENABLED, vec![0]);
        self.count_change(batch);
        Outcome { token: None, effect: Some(TokenEffect::AllRevoked) }
    }

    /// The member that proposed this has checked the password.
    fn authenticate(&self, request: InternalAuthenticateRequest, index: u64) -> Result<Outcome, Error> {
        if !self.enabled {
            return Err(Error::AuthNotEnabled);
        }
        if !self.users.contains_key(&request.name) {
            return Err(Error::AuthFailed);
        }
        if request.simple_token.is_empty() {
            return Ok(Outcome::default());
        }
        let token = format!("{}.{index}", request.simple_token);
        let effect = TokenEffect::Issued { user: request.name, token: token.clone() };
        Ok(Outcome { token: Some(token), effect: Some(effect) })
    }

    fn add_user(&mut self, batch: &mut Batch, request: AuthUserAddRequest) -> Result<Outcome, Error> {
        let AuthUserAddRequest { name, options, hashed_password, .. } = request;
        if name.is_empty() {
            return Err(Error::UserEmpty);
        }
        if self.users.contains_key(&name) {
            return Err(Error::UserAlreadyExist);
        }
        let options = options.unwrap_or_default();
        let password = if options.no_password { Bytes::new() } else { decode_password(&hashed_password)? };
        let user = User { name: name.clone().into(), password, roles: Vec::new(), options: Some(options) };
        self.put_user(batch, name, user);
        self.count_change(batch);
        Ok(Outcome::default())
    }

    fn delete_user(&mut self, batch: &mut Batch, name: String) -> Result<Outcome, Error> {
        if self.enabled && name == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.users.remove(&name).ok_or(Error::UserNotFound)?;
        self.permissions.remove(&name);
        batch.delete(Table::User, name.as_bytes());
        self.count_change(batch);
        Ok(Outcome { token: None, effect: Some(TokenEffect::RevokedOf(name)) })
    }

    fn change_password(&mut self, batch: &mut Batch, request: AuthUserChangePasswordRequest) -> Result<Outcome, Error> {
        let mut user = User::clone(self.users.get(&request.name).ok_or(Error::UserNotFound)?);
        if !has_no_password(&user) {
            user.password = decode_password(&request.hashed_password)?;
        }
        self.put_user(batch, request.name.clone(), user);
        self.count_change(batch);
        Ok(Outcome { token: None, effect: Some(TokenEffect::RevokedOf(request.name)) })
    }

    fn grant_role(&mut self, batch: &mut Batch, name: &str, role: String) -> Result<Outcome, Error> {
        let mut user = User::clone(self.users.get(name).ok_or(Error::UserNotFound)?);
        if role != ROOT && !self.roles.contains_key(&role) {
            return Err(Error::RoleNotFound);
        }
        if !user.roles.contains(&role) {
            user.roles.push(role);
            user.roles.sort_unstable();
            self.put_user(batch, name.to_owned(), user);
            self.count_change(batch);
        }
        Ok(Outcome::default())
    }

    fn revoke_role(&mut self, batch: &mut Batch, name: &str, role: &str) -> Result<Outcome, Error> {
        if self.enabled && name == ROOT && role == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        let mut user = User::clone(self.users.get(name).ok_or(Error::UserNotFound)?);
        let held = user.roles.iter().position(|held| held == role).ok_or(Error::RoleNotGranted)?;
        user.roles.remove(held);
        self.put_user(batch, name.to_owned(), user);
        self.count_change(batch);
        Ok(Outcome::default())
    }

    fn add_role(&mut self, batch: &mut Batch, name: String) -> Result<Outcome, Error> {
        if name.is_empty() {
            return Err(Error::RoleEmpty);
        }
        if self.roles.contains_key(&name) {
            return Err(Error::RoleAlreadyExist);
        }
        let role = Role { name: name.clone().into(), key_permission: Vec::new() };
        self.put_role(batch, name, role);
        self.count_change(batch);
        Ok(Outcome::default())
    }

    fn delete_role(&mut self, batch: &mut Batch, name: &str) -> Result<Outcome, Error> {
        if self.enabled && name == ROOT {
            return Err(Error::InvalidAuthManagement);
        }
        self.roles.remove(name).ok_or(Error::RoleNotFound)?;
        batch.delete(Table::Role, name.as_bytes());
        for user in self.holders_of(name) {
            let mut without = User::clone(&self.users[&user]);
            without.roles.retain(|held| held != name);
            self.put_user(batch, user, without);
        }
        self.count_change(batch);
        Ok(Outcome::default())
    }

    fn grant_permission(
        &mut self,
        batch: &mut Batch,
        request: AuthRoleGrantPermissionRequest,
    ) -> Result<Outcome, Error> {
        let granted = request.perm.ok_or(Error::PermissionNotGiven)?;
        if !permission::is_valid(&granted) {
            return Err(Error::InvalidAuthManagement);
        }
        let mut role = Role::clone(self.roles.get(&request.name).ok_or(Error::RoleNotFound)?);
        let held = &mut role.key_permission;
        // As in etcd, only the first permission for the key is compared.
        let at = held.partition_point(|held| held.key < granted.key);
        match held.get_mut(at) {
            Some(same) if same.key == granted.key && same.range_end == granted.range_end => {
                same.perm_type = granted.perm_type;
            }
            _ => {
                held.push(granted);
                held.sort_by(|a, b| a.key.cmp(&b.key));
            }
        }
        self.replace_role(batch, request.name, role);
        Ok(Outcome::default())
    }

    fn revoke_permission(
        &mut self,
        batch: &mut Batch,
        request: &AuthRoleRevokePermissionRequest,
    ) -> Result<Outcome, Error> {
        let mut role = Role::clone(self.roles.get(&request.role).ok_or(Error::RoleNotFound)?);
        let before = role.key_permission.len();
        role.key_permission.retain(|held| held.key != request.key || held.range_end != request.range_end);
        if role.key_permission.len() == before {
            return Err(Error::PermissionNotGranted);
        }
        self.replace_role(batch, request.role.clone(), role);
        Ok(Outcome::default())
    }

    fn replace_role(&mut self, batch: &mut Batch, name: String, role: Role) {
        let holders = self.holders_of(&name);
        self.put_role(batch, name, role);
        for user in &holders {
            self.merge_permissions(user);
        }
        self.count_change(batch);
    }

    /// The users that have a role.
    fn holders_of(&self, role: &str) -> Vec<String> {
        self.users.keys().filter(|user| self.has_role(user, role)).cloned().collect()
    }

    fn put_user(&mut self, batch: &mut Batch, name: String, user: User) {
        batch.put(Table::User, name.as_bytes(), user.encode_to_vec());
        self.users.insert(name.clone(), Arc::new(user));
        self.merge_permissions(&name);
    }

    fn put_role(&mut self, batch: &mut Batch, name: String, role: Role) {
        batch.put(Table::Role, name.as_bytes(), role.encode_to_vec());
        self.roles.insert(name, Arc::new(role));
    }

    fn merge_permissions(&mut self, name: &str) {
        let user = &self.users[name];
        let is_root = user.roles.iter().any(|role| role == ROOT);
        let roles = user.roles.iter().filter_map(|role| self.roles.get(role));
        let merged = Permissions::merge(is_root, roles.flat_map(|role| &role.key_permission));
        self.permissions.insert(name.to_owned(), Arc::new(merged));
    }

    fn count_change(&mut self, batch: &mut Batch) {
        self.revision += 1;
        batch.put(Table::Meta, meta::AUTH_REVISION, self.revision.to_be_bytes().to_vec());
    }
}

/// Whether a user can only be identified by a certificate.
#[must_use]
pub fn has_no_password(user: &User) -> bool {
    user.options.as_ref().is_some_and(|options| options.no_password)
}

fn decode_password(text: &str) -> Result<Bytes, Error> {
    use base64::Engine as _;
    BASE64.decode(text).map(Into::into).map_err(|_| Error::NoPasswordUser)
}

/// A password hash, as it travels in a log entry.
#[must_use]
pub fn encode_password(hash: &[u8]) -> String {
    use base64::Engine as _;
    BASE64.encode(hash)
}

fn text(name: &Bytes) -> Option<String> {
    String::from_utf8(name.to_vec()).ok()
}

/// The published tables, for any thread.
#[derive(Debug, Clone)]
pub struct Reader(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The same as in `tables`, where it costs less to look at.
    enabled: AtomicBool,
    tables: ArcSwap<Auth>,
}

impl Reader {
    pub(crate) fn new(auth: &Auth) -> Self {
        let enabled = AtomicBool::new(auth.enabled);
        Self(Arc::new(Shared { enabled, tables: ArcSwap::from_pointee(auth.clone()) }))
    }

    pub(crate) fn publish(&self, auth: &Auth) {
        self.0.tables.store(Arc::new(auth.clone()));
        // After the tables, so that a reader that sees authentication enabled finds its users.
        self.0.enabled.store(auth.enabled, Ordering::Release);
    }

    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.0.enabled.load(Ordering::Acquire)
    }

    /// The tables as they are now.
    #[must_use]
    pub fn tables(&self) -> arc_swap::Guard<Arc<Auth>> {
        self.0.tables.load()
    }
}
