//! Errors as the gateway answers them: a body with code and text.

use std::fmt::Write;

use super::encode::push_string;
use http2::call::CallError;

/// The body of an answer that is an error.
#[must_use]
pub fn body(error: &CallError) -> String {
    object(error, false)
}

/// The last line of a stream that ends with an error.
#[must_use]
pub fn line(error: &CallError) -> String {
    format!("{{\"error\":{}}}\n", object(error, true))
}

fn object(error: &CallError, escapes_html: bool) -> String {
    let mut out = String::from("{");
    write!(out, "\"code\":{}", error.code as i32).expect("writing to memory cannot fail");
    if !error.message.is_empty() {
        out.push_str(",\"message\":");
        push_string(&mut out, &error.message, escapes_html);
    }
    out.push('}');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use http2::call::Code;

    #[test]
    fn an_error_is_an_object_with_code_and_message() {
        let error = |message: &'static str| CallError { code: Code::NotFound, message: message.into() };
        assert_eq!(body(&error("a <\"b\">\n")), r#"{"code":5,"message":"a <\"b\">\n"}"#);
        assert_eq!(line(&error("a <b> & c")), "{\"error\":{\"code\":5,\"message\":\"a \\u003cb\\u003e \\u0026 c\"}}\n");
        assert_eq!(body(&error("")), r#"{"code":5}"#);
    }
}
