{{/* The name of everything: the release's, with the chart's unless it contains it. */}}
{{- define "metastore.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the members: must never change. */}}
{{- define "metastore.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "metastore.labels" -}}
{{ include "metastore.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "metastore.scheme" -}}
{{- ternary "https" "http" .Values.tls.enabled -}}
{{- end -}}

{{/* The domain of the members: each has a name of its own below it. */}}
{{- define "metastore.peerDomain" -}}
{{- printf "%s-peers.%s.svc.%s" (include "metastore.name" .) .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{- define "metastore.initialCluster" -}}
{{- $members := list -}}
{{- range $i := until (int .Values.replicas) -}}
{{- $member := printf "%s-%d" (include "metastore.name" $) $i -}}
{{- $members = append $members (printf "%s=%s://%s.%s:2380" $member (include "metastore.scheme" $) $member (include "metastore.peerDomain" $)) -}}
{{- end -}}
{{- join "," $members -}}
{{- end -}}

{{/* All names that certificates have to be valid for, a line each. */}}
{{- define "metastore.certificateNames" -}}
{{- $service := printf "%s.%s.svc" (include "metastore.name" .) .Release.Namespace -}}
localhost
{{ include "metastore.name" . }}
{{ $service }}
{{ $service }}.{{ .Values.clusterDomain }}
{{- range $i := until (int .Values.replicas) }}
{{ include "metastore.name" $ }}-{{ $i }}.{{ include "metastore.peerDomain" $ }}
{{- end }}
{{- end -}}

{{- define "metastore.clientSecret" -}}
{{- if .Values.tls.clientSecret -}}
{{- .Values.tls.clientSecret -}}
{{- else if .Values.tls.certManager.enabled -}}
{{- include "metastore.name" . }}-client-tls
{{- else -}}
{{- fail "tls.clientSecret is empty: name a secret with ca.crt, tls.crt and tls.key, set tls.certManager.enabled, or turn tls.enabled off" -}}
{{- end -}}
{{- end -}}

{{- define "metastore.peerSecret" -}}
{{- if .Values.tls.peerSecret -}}
{{- .Values.tls.peerSecret -}}
{{- else if .Values.tls.certManager.enabled -}}
{{- include "metastore.name" . }}-peer-tls
{{- else -}}
{{- fail "tls.peerSecret is empty: name a secret with ca.crt, tls.crt and tls.key, set tls.certManager.enabled, or turn tls.enabled off" -}}
{{- end -}}
{{- end -}}
