//! JSON web tokens (RFC 7519): signed by the member that a client has logged in at, and verified by any member that has the key.
//!
//! The claims are etcd's: `username`, `revision` (the auth revision at the login) and `exp`. A token is not stored anywhere, so it
//! cannot be revoked; but every change of users makes it too old for requests to keys.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header, Validation, jwk::Jwk};
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use crate::{
    config::auth::{INVALID_OPTIONS, JwtConfig},
    error::Error,
};

/// How many verified tokens are remembered, so that a signature is not checked for every request.
const REMEMBERED_TOKENS: usize = 10_000;

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    username: String,
    revision: u64,
    exp: u64,
}

/// A token that was verified.
#[derive(Debug, Clone)]
struct Verified {
    user: Arc<str>,
    auth_revision: u64,
    until: Instant,
}

/// Signs and verifies tokens.
pub struct Jwt {
    method: Algorithm,
    /// None: this member only verifies.
    signing: Option<EncodingKey>,
    verifying: DecodingKey,
    validation: Validation,
    ttl: Duration,
    verified: Cache<String, Verified>,
}

impl Jwt {
    /// Reads the keys.
    pub fn open(config: &JwtConfig) -> Result<Self, String> {
        let invalid = |why: String| format!("{INVALID_OPTIONS}: {why}");
        let method = algorithm(&config.method).map_err(invalid)?;
        let read = |path: &Path| fs::read(path).map_err(|error| invalid(format!("{}: {error}", path.display())));
        let public = config.public_key.as_deref().map(read).transpose()?;
        let private = config.private_key.as_deref().map(read).transpose()?;
        let (signing, verifying) = keys(method, public.as_deref(), private.as_deref())?;
        let mut validation = Validation::new(method);
        validation.leeway = 0;
        validation.validate_aud = false;
        let verified = Cache::new(REMEMBERED_TOKENS);
        Ok(Self { method, signing, verifying, validation, ttl: config.ttl, verified })
    }

    /// A token for a user, who has logged in at this auth revision.
    pub fn sign(&self, user: &str, auth_revision: u64) -> Result<String, Error> {
        let Some(key) = &self.signing else {
            return Err(Error::Unknown("auth: token signing attempted with verify-only key".into()));
        };
        let until = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + self.ttl;
        let claims = Claims { username: user.to_owned(), revision: auth_revision, exp: until.as_secs() };
        let signed = jsonwebtoken::encode(&Header::new(self.method), &claims, key);
        signed.map_err(|error| Error::Unknown(format!("auth: failed to sign a JWT: {error}")))
    }

    /// The user of a valid token, and the auth revision at which it was issued.
    pub fn verify(&self, token: &str) -> Option<(Arc<str>, u64)> {
        if let Some(verified) = self.verified.get(token).filter(|verified| verified.until > Instant::now()) {
            return Some((verified.user, verified.auth_revision));
        }
        let claims = match jsonwebtoken::decode::<Claims>(token, &self.verifying, &self.validation) {
            Ok(decoded) => decoded.claims,
            Err(error) => {
                tracing::debug!(%error, "an invalid JSON web token was refused");
                return None;
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let left = Duration::from_secs(claims.exp).saturating_sub(now);
        if left.is_zero() {
            return None; // The library lets it live until the end of this second.
        }
        let user: Arc<str> = claims.username.into();
        let until = Instant::now() + left.min(self.ttl);
        let verified = Verified { user: user.clone(), auth_revision: claims.revision, until };
        self.verified.insert(token.to_owned(), verified);
        Some((user, claims.revision))
    }
}

fn algorithm(name: &str) -> Result<Algorithm, String> {
    name.parse().map_err(|_| {
        format!(
            "unknown sign-method {name:?}: RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA, HS256, HS384 and \
             HS512 are known"
        )
    })
}

/// The keys to sign and to verify with.
fn keys(
    method: Algorithm,
    public: Option<&[u8]>,
    private: Option<&[u8]>,
) -> Result<(Option<EncodingKey>, DecodingKey), String> {
    let unusable = |which: &str| {
        let which = which.to_owned();
        move |error: jsonwebtoken::errors::Error| format!("{INVALID_OPTIONS}: the {which} key cannot be used: {error}")
    };
    if method.family() == AlgorithmFamily::Hmac {
        // The same secret signs and verifies.
        let secret = private.ok_or("auth: missing key data")?;
        let signing = EncodingKey::from_secret(secret).map_err(unusable("private"))?;
        return Ok((Some(signing), DecodingKey::from_secret(secret).map_err(unusable("private"))?));
    }
    let read_private = |pem: &[u8]| match method.family() {
        AlgorithmFamily::Ec => EncodingKey::from_ec_pem(pem),
        AlgorithmFamily::Ed => EncodingKey::from_ed_pem(pem),
        AlgorithmFamily::Rsa | AlgorithmFamily::Hmac => EncodingKey::from_rsa_pem(pem),
    };
    let read_public = |pem: &[u8]| match method.family() {
        AlgorithmFamily::Ec => DecodingKey::from_ec_pem(pem),
        AlgorithmFamily::Ed => DecodingKey::from_ed_pem(pem),
        AlgorithmFamily::Rsa | AlgorithmFamily::Hmac => DecodingKey::from_rsa_pem(pem),
    };
    let signing = private.map(read_private).transpose().map_err(unusable("private"))?;
    let verifying = match (public, &signing) {
        (Some(public), _) => read_public(public).map_err(unusable("public"))?,
        (None, Some(signing)) => {
            let public_half = Jwk::from_encoding_key(signing, method);
            public_half.and_then(|key| DecodingKey::from_jwk(&key)).map_err(unusable("private"))?
        }
        (None, None) => return Err("auth: missing key data".to_owned()),
    };
    if let Some(key) = &signing {
        check_pair(method, key, &verifying)?;
    }
    Ok((signing, verifying))
}

/// Whether what one key signs the other one verifies.
fn check_pair(method: Algorithm, signing: &EncodingKey, verifying: &DecodingKey) -> Result<(), String> {
    let message = b"metastore";
    let signature = jsonwebtoken::crypto::sign(message, signing, method)
        .map_err(|error| format!("{INVALID_OPTIONS}: cannot sign with the private key: {error}"))?;
    match jsonwebtoken::crypto::verify(&signature, message, verifying, method) {
        Ok(true) => Ok(()),
        Ok(false) | Err(_) => Err("auth: public and private keys don't match".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SignatureAlgorithm};
    use tempfile::TempDir;

    use super::*;

    /// Made for these tests, and used nowhere else.
    const RSA_KEY: &str = include_str!("jwt/test_rsa_key.pem");
    const RSA_PUBLIC_KEY: &str = include_str!("jwt/test_rsa_public_key.pem");
    const ED25519_KEY: &str = include_str!("jwt/test_ed25519_key.pem");
    const ED25519_PUBLIC_KEY: &str = include_str!("jwt/test_ed25519_public_key.pem");

    fn open(directory: &TempDir, method: &str, public: Option<&str>, private: Option<&str>) -> Result<Jwt, String> {
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        Jwt::open(&JwtConfig {
            method: method.to_owned(),
            public_key: public.map(|text| write("public", text)),
            private_key: private.map(|text| write("private", text)),
            ttl: Duration::from_mins(5),
        })
    }

    /// A private and a public key for a method.
    fn pair(method: &str) -> (String, Option<String>) {
        let generated = |algorithm: &'static SignatureAlgorithm| {
            let pair = KeyPair::generate_for(algorithm).unwrap();
            (pair.serialize_pem(), Some(pair.public_key_pem()))
        };
        match method {
            "ES256" => generated(&PKCS_ECDSA_P256_SHA256),
            "ES384" => generated(&PKCS_ECDSA_P384_SHA384),
            "EdDSA" => (ED25519_KEY.to_owned(), Some(ED25519_PUBLIC_KEY.to_owned())),
            _ if method.starts_with("HS") => ("a secret".to_owned(), None),
            _ => (RSA_KEY.to_owned(), Some(RSA_PUBLIC_KEY.to_owned())),
        }
    }

    const METHODS: [&str; 12] =
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA", "HS256", "HS384", "HS512"];

    fn user_of(jwt: &Jwt, token: &str) -> Option<(String, u64)> {
        jwt.verify(token).map(|(user, auth_revision)| (user.to_string(), auth_revision))
    }

    #[test]
    fn a_token_is_verified_with_either_key_of_its_pair() {
        let directory = tempfile::tempdir().unwrap();
        for method in METHODS {
            let (private, public) = pair(method);
            let both = open(&directory, method, public.as_deref(), Some(&private)).unwrap();
            let token = both.sign("ann", 7).unwrap();
            let ann = Some(("ann".to_owned(), 7));
            assert_eq!((user_of(&both, &token), user_of(&both, &token)), (ann.clone(), ann.clone()), "{method}");
            let private_only = open(&directory, method, None, Some(&private)).unwrap();
            assert_eq!(user_of(&private_only, &token), ann, "{method}");
            if let Some(public) = public {
                let public_only = open(&directory, method, Some(&public), None).unwrap();
                assert_eq!(user_of(&public_only, &token), ann, "{method}");
                let refused = public_only.sign("ann", 7).unwrap_err().to_string();
                assert_eq!(refused, "auth: token signing attempted with verify-only key");
            }
        }
    }

    #[test]
    fn a_token_of_another_key_or_method_is_invalid() {
        let directory = tempfile::tempdir().unwrap();
        let jwt = |method: &str, private: &str| open(&directory, method, None, Some(private)).unwrap();
        let (ours, theirs) = (jwt("HS256", "ours"), jwt("HS256", "theirs"));
        let token = ours.sign("ann", 1).unwrap();
        assert!(ours.verify(&token).is_some() && theirs.verify(&token).is_none());
        assert!(jwt("HS512", "ours").verify(&token).is_none(), "its method is not the configured one");
        // A public key is no secret: it must not verify what it has signed as one.
        let rsa = open(&directory, "RS256", Some(RSA_PUBLIC_KEY), None).unwrap();
        assert!(rsa.verify(&jwt("HS256", RSA_PUBLIC_KEY).sign("root", 1).unwrap()).is_none());
        let unsigned = "eyJhbGciOiJub25lIn0.eyJ1c2VybmFtZSI6InJvb3QiLCJyZXZpc2lvbiI6MSwiZXhwIjo5OTk5OTk5OTk5fQ.";
        for token in [unsigned, "", ".", "..", "a.b.c", &token[1..], &token[..token.len() - 1]] {
            assert!(ours.verify(token).is_none() && rsa.verify(token).is_none(), "{token:?}");
        }
    }

    #[test]
    fn a_token_is_invalid_after_its_time() {
        let directory = tempfile::tempdir().unwrap();
        let mut jwt = open(&directory, "HS256", None, Some("key")).unwrap();
        jwt.ttl = Duration::ZERO;
        let over = jwt.sign("ann", 1).unwrap();
        assert!(jwt.verify(&over).is_none() && jwt.verify(&over).is_none());
    }

    #[test]
    fn keys_that_cannot_be_used_are_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |method, public, private| open(&directory, method, public, private).err().unwrap();
        assert_eq!(refused("RS256", None, None), "auth: missing key data");
        assert_eq!(refused("HS256", Some("x"), None), "auth: missing key data");
        assert!(refused("RS257", None, Some("x")).contains("unknown sign-method \"RS257\""));
        assert!(refused("ES256", None, Some("x")).contains("the private key cannot be used"));
        let other = pair("ES256").1;
        let (private, _) = pair("ES256");
        assert_eq!(refused("ES256", other.as_deref(), Some(&private)), "auth: public and private keys don't match");
    }

    mod arbitrary {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #![proptest_config(ProptestConfig::with_cases(20_000))]

            /// No text but a token that was signed is one, and none makes the parser panic.
            #[test]
            fn texts_are_no_tokens(text in "[a-zA-Z0-9._=-]{0,200}", at in 0_usize..200, byte in any::<u8>()) {
                thread_local! {
                    static JWT: (Jwt, String) = {
                        let directory = tempfile::tempdir().unwrap();
                        let jwt = open(&directory, "HS256", None, Some("key")).unwrap();
                        let token = jwt.sign("ann", 1).unwrap();
                        (jwt, token)
                    };
                }
                JWT.with(|(jwt, token)| {
                    prop_assert!(jwt.verify(&text).is_none());
                    let mut changed = token.clone().into_bytes();
                    let at = at % changed.len();
                    changed[at] ^= byte;
                    if let Ok(changed) = String::from_utf8(changed) && changed != *token {
                        prop_assert!(jwt.verify(&changed).is_none(), "{changed}");
                    }
                    Ok(())
                })?;
            }
        }
    }
}
