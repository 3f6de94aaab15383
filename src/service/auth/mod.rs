//! Authentication: identifies callers, checks what they may do, and the operations on users and roles.
//!
//! ```text
//! Caller ── token, or certificate ──▶ Identity { user, auth revision } ──▶ permission, on this member
//!                                            └── in the header of the entry ──▶ permission again, where it is applied
//! ```
//!
//! What this member has applied may be behind: a user may have been given a permission, or a token, through another member a
//! moment ago. So nothing is denied before everything that was acknowledged earlier is applied here (`Service::refuse`).
//!
//! What each operation needs is in `admission.rs`.

pub mod audit;
pub mod jwt;
pub mod passwords;

use std::{sync::Arc, task::Waker};

use bytes::Bytes;
use prost::Message;

use super::{
    Caller, Operation, Outcome, Reply, Request, Service,
    reply::{self, OneshotReceiver},
};
use crate::{
    auth::{self, Requester, encode_password, has_no_password},
    error::Error,
    node::simple_tokens,
    proto::{
        authpb::Permission,
        etcdserverpb::{
            AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse, AuthRoleAddRequest,
            AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse, AuthRoleGrantPermissionRequest,
            AuthRoleGrantPermissionResponse, AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse,
            AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest, AuthUserChangePasswordResponse,
            AuthUserDeleteRequest, AuthUserDeleteResponse, AuthUserGrantRoleRequest, AuthUserGrantRoleResponse,
            AuthUserRevokeRoleRequest, AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse,
            InternalAuthenticateRequest,
        },
    },
    state::Kind,
};
use jwt::Jwt;
use passwords::Passwords;

/// The random letters of a simple token.
const TOKEN_LETTERS: usize = 16;

/// How tokens are issued and verified.
pub enum Tokens {
    /// They are kept by each member ([`simple_tokens`]).
    Simple,
    Jwt(Arc<Jwt>),
    /// No token is issued, and none is valid.
    None,
}

/// What authentication needs on this member.
pub struct Authentication {
    pub tokens: Tokens,
    pub passwords: Arc<Passwords>,
    /// Whether the common name of a client's certificate is its user.
    pub certificates_name_users: bool,
}

/// The user on whose behalf a request is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// None if the caller has no user, or while authentication is disabled.
    user: Option<Arc<str>>,
    /// The auth revision at which the user was identified; 0 if there is none.
    auth_revision: u64,
}

impl Identity {
    fn of(user: Arc<str>, auth_revision: u64) -> Self {
        Self { user: Some(user), auth_revision }
    }

    /// Empty if there is none.
    #[must_use]
    pub fn user(&self) -> &str {
        self.user.as_deref().unwrap_or_default()
    }

    #[must_use]
    pub fn requester(&self) -> Requester<'_> {
        Requester { user: self.user(), auth_revision: self.auth_revision }
    }
}

/// Whether users are enabled, and the changes of users so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthStatus {
    pub head: i64,
    pub enabled: bool,
    pub auth_revision: u64,
}

/// Names, at a revision.
#[derive(Debug)]
pub struct Names {
    pub head: i64,
    pub names: Vec<String>,
}

/// The permissions of a role, at a revision.
#[derive(Debug)]
pub struct RolePermissions {
    pub head: i64,
    pub permissions: Vec<Permission>,
}

/// Identity and permission.
impl Service {
    #[must_use]
    pub fn auth_is_enabled(&self) -> bool {
        self.readers().auth.is_enabled()
    }

    /// The user of a caller, as far as this member knows.
    pub fn identify(&self, caller: &Caller) -> Result<Identity, Error> {
        let readers = self.readers();
        if !readers.auth.is_enabled() {
            return Ok(Identity::default());
        }
        if let Some(token) = &caller.token {
            let token = std::str::from_utf8(token).map_err(|_| Error::InvalidAuthToken)?;
            let token = token.strip_prefix("Bearer ").unwrap_or(token);
            let (user, auth_revision) = match &self.authentication.tokens {
                Tokens::Simple => {
                    let user = self.node().simple_tokens().user(token).ok_or(Error::InvalidAuthToken)?;
                    (user, readers.auth.tables().revision())
                }
                Tokens::Jwt(jwt) => jwt.verify(token).ok_or(Error::InvalidAuthToken)?,
                Tokens::None => return Err(Error::InvalidAuthToken),
            };
            return Ok(Identity::of(user, auth_revision));
        }
        let named = caller.connection.as_ref().and_then(|connection| connection.common_name.clone());
        match named.filter(|_| self.authentication.certificates_name_users) {
            Some(user) => Ok(Identity::of(user, readers.auth.tables().revision())),
            None => Ok(Identity::default()),
        }
    }

    /// Whether a caller's identity can only be known once more of the log is applied here.
    pub fn must_await_token(&self, caller: &Caller) -> bool {
        let is_pending =
            |token: &str| simple_tokens::index_of(token).is_some_and(|index| index > self.node().status().applied());
        matches!(self.authentication.tokens, Tokens::Simple)
            && caller.token.as_ref().and_then(|token| std::str::from_utf8(token).ok()).is_some_and(is_pending)
    }
}

/// Waits until a stream's caller can be identified: a token is known here once the entry that issued it is applied here.
pub struct TokenBarrier {
    service: Arc<Service>,
    caller: Caller,
    state: TokenState,
}

enum TokenState {
    Unknown,
    Awaited(OneshotReceiver),
    Known,
}

impl TokenBarrier {
    #[must_use]
    pub fn new(service: &Arc<Service>, caller: &Caller) -> Self {
        Self { service: service.clone(), caller: caller.clone(), state: TokenState::Unknown }
    }

    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Whether the caller can be identified. If not, `waker` is woken when it can be.
    pub fn is_passed(&mut self, waker: &Waker) -> bool {
        match &self.state {
            TokenState::Known => return true,
            TokenState::Unknown if self.service.must_await_token(&self.caller) => {
                let (receiver, callback) = reply::channel(waker);
                self.state = TokenState::Awaited(receiver);
                self.service.node().read_barrier(callback);
                return false;
            }
            TokenState::Awaited(receiver) if receiver.outcome().is_none() => return false,
            TokenState::Unknown | TokenState::Awaited(_) => (),
        }
        self.state = TokenState::Known;
        true
    }
}

/// Changes of users and roles, and whether they are enabled.
impl Service {
    /// Lets in an operation that only root may carry out, and whose outcome is noted in the audit log. `target` says what it is
    /// done to.
    pub(super) fn administer<T, R: Reply<T>>(
        self: &Arc<Self>,
        caller: &Caller,
        operation: Operation<'static>,
        target: String,
        reply: R,
        then: impl FnOnce(&Arc<Self>, &Identity, Administered<R>) + Send + 'static,
    ) {
        match self.admit(caller, &operation) {
            Ok(identity) => {
                let (caller, name) = (caller.clone(), operation.name());
                let reply = Administered { caller, identity: identity.clone(), operation: name, target, reply };
                then(self, &identity, reply);
            }
            Err(error) => self.refuse(caller, operation.name(), error, reply, move |service, caller, reply| {
                service.administer(caller, operation, target, reply, then);
            }),
        }
    }

    /// Proposes a change of users.
    fn change_auth<T: Message + 'static, M: Send + 'static>(
        self: &Arc<Self>,
        caller: &Caller,
        operation: Operation<'static>,
        kind: Kind,
        target: &str,
        request: Request<T>,
        reply: impl Reply<Outcome<M>>,
    ) {
        self.administer(caller, operation, target.to_owned(), reply, move |service, identity, reply| {
            if service.node().status().capability_level() < kind.level() {
                return reply.answer(Err(Error::NotCapable));
            }
            service.propose(identity, kind, &request.raw, reply);
        });
    }

    pub fn auth_enable(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthEnableRequest>,
        reply: impl Reply<Outcome<AuthEnableResponse>>,
    ) {
        self.change_auth(caller, Operation::AuthEnable, Kind::AuthEnable, "", request, reply);
    }

    pub fn auth_disable(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthDisableRequest>,
        reply: impl Reply<Outcome<AuthDisableResponse>>,
    ) {
        self.change_auth(caller, Operation::AuthDisable, Kind::AuthDisable, "", request, reply);
    }

    /// The password is hashed before it is proposed: it is never in the log.
    pub fn user_add(
        self: &Arc<Self>,
        caller: &Caller,
        request: AuthUserAddRequest,
        reply: impl Reply<Outcome<AuthUserAddResponse>>,
    ) {
        let add = |service: &Arc<Self>, caller: &Caller, request: AuthUserAddRequest, reply| {
            let name = request.name.clone();
            service.change_auth(caller, Operation::UserAdd, Kind::UserAdd, &name, Request::new(request), reply);
        };
        if request.options.as_ref().is_some_and(|options| options.no_password) {
            return add(self, caller, request, reply);
        }
        let (service, caller, password) = (self.clone(), caller.clone(), request.password.clone());
        self.authentication.passwords.hash(password, move |hash| match hash {
            Ok(hash) => {
                let hashed_password = encode_password(&hash);
                add(
                    &service,
                    &caller,
                    AuthUserAddRequest { password: String::new(), hashed_password, ..request },
                    reply,
                );
            }
            Err(error) => reply.answer(Err(error)),
        });
    }

    pub fn user_change_password(
        self: &Arc<Self>,
        caller: &Caller,
        request: AuthUserChangePasswordRequest,
        reply: impl Reply<Outcome<AuthUserChangePasswordResponse>>,
    ) {
        let change = |service: &Arc<Self>, caller: &Caller, request: AuthUserChangePasswordRequest, reply| {
            let (name, operation) = (request.name.clone(), Operation::UserChangePassword);
            service.change_auth(caller, operation, Kind::UserChangePassword, &name, Request::new(request), reply);
        };
        if request.password.is_empty() {
            return change(self, caller, request, reply);
        }
        let (service, caller, password) = (self.clone(), caller.clone(), request.password.clone());
        self.authentication.passwords.hash(password, move |hash| match hash {
            Ok(hash) => {
                let (password, hashed_password) = (String::new(), encode_password(&hash));
                let request = AuthUserChangePasswordRequest { password, hashed_password, ..request };
                change(&service, &caller, request, reply);
            }
            Err(error) => reply.answer(Err(error)),
        });
    }

    pub fn user_delete(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthUserDeleteRequest>,
        reply: impl Reply<Outcome<AuthUserDeleteResponse>>,
    ) {
        let name = request.parsed.name.clone();
        self.change_auth(caller, Operation::UserDelete, Kind::UserDelete, &name, request, reply);
    }

    pub fn user_grant_role(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthUserGrantRoleRequest>,
        reply: impl Reply<Outcome<AuthUserGrantRoleResponse>>,
    ) {
        let target = format!("{} {}", request.parsed.user, request.parsed.role);
        self.change_auth(caller, Operation::UserGrantRole, Kind::UserGrantRole, &target, request, reply);
    }

    pub fn user_revoke_role(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthUserRevokeRoleRequest>,
        reply: impl Reply<Outcome<AuthUserRevokeRoleResponse>>,
    ) {
        let target = format!("{} {}", request.parsed.name, request.parsed.role);
        self.change_auth(caller, Operation::UserRevokeRole, Kind::UserRevokeRole, &target, request, reply);
    }

    pub fn role_add(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthRoleAddRequest>,
        reply: impl Reply<Outcome<AuthRoleAddResponse>>,
    ) {
        let name = request.parsed.name.clone();
        self.change_auth(caller, Operation::RoleAdd, Kind::RoleAdd, &name, request, reply);
    }

    pub fn role_delete(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthRoleDeleteRequest>,
        reply: impl Reply<Outcome<AuthRoleDeleteResponse>>,
    ) {
        let name = request.parsed.role.clone();
        self.change_auth(caller, Operation::RoleDelete, Kind::RoleDelete, &name, request, reply);
    }

    pub fn role_grant_permission(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthRoleGrantPermissionRequest>,
        reply: impl Reply<Outcome<AuthRoleGrantPermissionResponse>>,
    ) {
        let (name, operation) = (request.parsed.name.clone(), Operation::RoleGrantPermission);
        self.change_auth(caller, operation, Kind::RoleGrantPermission, &name, request, reply);
    }

    pub fn role_revoke_permission(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request<AuthRoleRevokePermissionRequest>,
        reply: impl Reply<Outcome<AuthRoleRevokePermissionResponse>>,
    ) {
        let (name, operation) = (request.parsed.role.clone(), Operation::RoleRevokePermission);
        self.change_auth(caller, operation, Kind::RoleRevokePermission, &name, request, reply);
    }
}

/// What can be asked about users and roles. It is read once everything that was acknowledged before is applied here; in etcd these
/// questions are entries of the log.
impl Service {
    fn read_auth<T: Send + 'static>(
        self: &Arc<Self>,
        caller: &Caller,
        operation: Operation<'static>,
        reply: impl Reply<T>,
        read: impl FnOnce(&auth::Auth, &Identity, i64) -> Result<T, Error> + Send + 'static,
    ) {
        let (service, caller) = (self.clone(), caller.confirmed());
        if let Err(error) = self.check_member(&caller, &operation) {
            return reply.answer(Err(error));
        }
        self.read(false, reply, move |reply| {
            let admitted = service.admit(&caller, &operation);
            let readers = service.readers();
            let outcome = match &admitted {
                Ok(identity) => read(&readers.auth.tables(), identity, service.head()),
                Err(error) => Err(error.clone()),
            };
            if let Err(error) = &outcome
                && audit::is_denial(error)
            {
                let identity = admitted.unwrap_or_default();
                audit::denied(&caller, &identity, operation.name(), error);
            }
            reply.answer(outcome);
        });
    }

    pub fn auth_status(self: &Arc<Self>, caller: &Caller, reply: impl Reply<AuthStatus>) {
        self.read_auth(caller, Operation::AuthStatus, reply, |auth, _, head| {
            Ok(AuthStatus { head, enabled: auth.is_enabled(), auth_revision: auth.revision() })
        });
    }

    /// The roles of a user. Any user may ask about itself.
    pub fn user_get(self: &Arc<Self>, caller: &Caller, name: String, reply: impl Reply<Names>) {
        self.read_auth(caller, Operation::UserGet, reply, move |auth, identity, head| {
            if identity.user() != name {
                auth.check_root(identity.requester())?;
            }
            let user = auth.user(&name).ok_or(Error::UserNotFound)?;
            Ok(Names { head, names: user.roles.clone() })
        });
    }

    pub fn user_list(self: &Arc<Self>, caller: &Caller, reply: impl Reply<Names>) {
        self.read_auth(caller, Operation::UserList, reply, |auth, _, head| {
            Ok(Names { head, names: auth.users().cloned().collect() })
        });
    }

    /// The permissions of a role. A user may ask about each of its own roles.
    pub fn role_get(self: &Arc<Self>, caller: &Caller, name: String, reply: impl Reply<RolePermissions>) {
        self.read_auth(caller, Operation::RoleGet, reply, move |auth, identity, head| {
            if !auth.has_role(identity.user(), &name) {
                auth.check_root(identity.requester())?;
            }
            let role = auth.role(&name).ok_or(Error::RoleNotFound)?;
            let permissions = if name == auth::ROOT { vec![all_keys()] } else { role.key_permission.clone() };
            Ok(RolePermissions { head, permissions })
        });
    }

    pub fn role_list(self: &Arc<Self>, caller: &Caller, reply: impl Reply<Names>) {
        self.read_auth(caller, Operation::RoleList, reply, |auth, _, head| {
            Ok(Names { head, names: auth.roles().cloned().collect() })
        });
    }
}

/// The permission that the role `root` stands for.
fn all_keys() -> Permission {
    use crate::{auth::permission::OPEN_END, proto::authpb::permission::Type};
    Permission { perm_type: Type::Readwrite as i32, key: Bytes::new(), range_end: Bytes::from_static(OPEN_END) }
}

/// Logging in.
impl Service {
    /// Checks a password, and issues a token.
    pub fn authenticate(
        self: &Arc<Self>,
        caller: &Caller,
        request: AuthenticateRequest,
        reply: impl Reply<Outcome<AuthenticateResponse>>,
    ) {
        if let Err(error) = self.admit(caller, &Operation::Authenticate) {
            return reply.answer(Err(error));
        }
        let (service, caller) = (self.clone(), caller.clone());
        self.read(false, reply, move |reply| service.check_login(caller, request, reply));
    }

    fn check_login(
        self: Arc<Self>,
        caller: Caller,
        request: AuthenticateRequest,
        reply: impl Reply<Outcome<AuthenticateResponse>>,
    ) {
        let readers = self.readers();
        let auth = readers.auth.tables();
        if !auth.is_enabled() {
            return reply.answer(Err(Error::AuthNotEnabled));
        }
        let identity = Identity::of(request.name.as_str().into(), auth.revision());
        let refuse = |reply: _, error: Error| refuse_login(&caller, &identity, reply, error);
        let Some(user) = auth.user(&request.name) else { return refuse(reply, Error::AuthFailed) };
        if has_no_password(user) {
            return refuse(reply, Error::NoPasswordUser);
        }
        let (stored, service, passwords) = (user.password.clone(), self.clone(), &self.authentication.passwords);
        let then = {
            let (caller, identity) = (caller.clone(), identity.clone());
            move |is_right: Result<bool, Error>, request: AuthenticateRequest| match is_right {
                Ok(true) => service.log_in(caller, identity, request, reply),
                Ok(false) => refuse_login(&caller, &identity, reply, Error::AuthFailed),
                Err(error) => reply.answer(Err(error)),
            }
        };
        let password = request.password.clone();
        passwords.check(&request.name.clone(), password, stored, move |is_right| then(is_right, request));
    }

    /// Issues a token for a user whose password was right at the identity's auth revision. If users have changed since, it is
    /// checked again.
    fn log_in(
        self: Arc<Self>,
        caller: Caller,
        identity: Identity,
        request: AuthenticateRequest,
        reply: impl Reply<Outcome<AuthenticateResponse>>,
    ) {
        let simple_token = match &self.authentication.tokens {
            Tokens::Simple => random_letters(),
            Tokens::Jwt(_) => String::new(),
            Tokens::None => return refuse_login(&caller, &identity, reply, Error::AuthFailed),
        };
        let login = InternalAuthenticateRequest { name: request.name.clone(), password: String::new(), simple_token };
        let login = Request::new(login);
        let service = self.clone();
        let reply = LoggedIn { service, caller, identity, request, reply };
        self.propose(&Identity::default(), Kind::Authenticate, &login.raw, reply);
    }
}

fn refuse_login<T>(caller: &Caller, identity: &Identity, reply: impl Reply<T>, error: Error) {
    audit::denied(caller, identity, Operation::Authenticate.name(), &error);
    reply.answer(Err(error));
}

fn random_letters() -> String {
    use rand::distr::{Alphabetic, SampleString};
    Alphabetic.sample_string(&mut rand::rng(), TOKEN_LETTERS)
}

/// The reply of a login whose entry was proposed.
struct LoggedIn<R> {
    service: Arc<Service>,
    caller: Caller,
    identity: Identity,
    request: AuthenticateRequest,
    reply: R,
}

impl<R: Reply<Outcome<AuthenticateResponse>>> Reply<Outcome<AuthenticateResponse>> for LoggedIn<R> {
    fn answer(self, outcome: Result<Outcome<AuthenticateResponse>, Error>) {
        let Self { service, caller, identity, request, reply } = self;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return reply.answer(Err(error)),
        };
        let auth_revision = service.readers().auth.tables().revision();
        if auth_revision != identity.auth_revision {
            return reply.run(move |reply| service.check_login(caller, request, reply));
        }
        let Tokens::Jwt(jwt) = &service.authentication.tokens else { return reply.answer(Ok(outcome)) };
        let jwt = jwt.clone();
        reply.run(move |reply| {
            // On the call's own task: signing takes long, and this runs on the apply thread.
            let signed = jwt.sign(identity.user(), auth_revision);
            reply.answer(signed.map(|token| {
                let response = AuthenticateResponse { header: None, token };
                Outcome { body: response.encode_to_vec(), ..outcome }
            }));
        });
    }

    fn run(self, work: impl FnOnce(Self) + Send + 'static) {
        let Self { service, caller, identity, request, reply } = self;
        reply.run(move |reply| work(Self { service, caller, identity, request, reply }));
    }

    fn is_wanted(&self) -> bool {
        self.reply.is_wanted()
    }
}

/// The reply of an operation of root, which is noted in the audit log.
pub(super) struct Administered<R> {
    caller: Caller,
    identity: Identity,
    operation: &'static str,
    target: String,
    reply: R,
}

impl<T, R: Reply<T>> Reply<T> for Administered<R> {
    fn answer(self, outcome: Result<T, Error>) {
        let Self { caller, identity, operation, target, reply } = self;
        audit::administered(&caller, &identity, operation, &target, outcome.as_ref().err());
        reply.answer(outcome);
    }

    fn run(self, work: impl FnOnce(Self) + Send + 'static) {
        let Self { caller, identity, operation, target, reply } = self;
        reply.run(move |reply| work(Self { caller, identity, operation, target, reply }));
    }

    fn is_wanted(&self) -> bool {
        self.reply.is_wanted()
    }
}
