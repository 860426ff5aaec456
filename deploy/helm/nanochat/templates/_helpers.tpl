{{- define "nanochat.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select a component's pods. Takes (list $ "component"). */}}
{{- define "nanochat.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of a component's resource. Takes (list $ "component"). */}}
{{- define "nanochat.labels" -}}
{{- $root := index . 0 -}}
{{ include "nanochat.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nanochat
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{/* Image reference of a component. Takes (list $ "component"). */}}
{{- define "nanochat.image" -}}
{{- $root := index . 0 -}}
{{- $name := (index $root.Values (index . 1)).image -}}
{{- with $root.Values.image.registry }}{{ . }}/{{ end }}{{ $name }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}
{{- end -}}

{{/* Pod fields of all pods. They meet the restricted Pod Security level. Takes (list $ "component"). */}}
{{- define "nanochat.podDefaults" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
serviceAccountName: {{ include "nanochat.fullname" $root }}-{{ index . 1 }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "nanochat.selectorLabels" . | nindent 8 }}
{{- end -}}

{{- define "nanochat.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Environment variables from a mapping of names to values. */}}
{{- define "nanochat.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Environment variables of mutual TLS. */}}
{{- define "nanochat.tlsEnv" -}}
{{- if .Values.tls.enabled -}}
- name: NANOCHAT_TLS_CA
  value: /etc/nanochat/tls/ca.crt
- name: NANOCHAT_TLS_CERTIFICATE
  value: /etc/nanochat/tls/tls.crt
- name: NANOCHAT_TLS_KEY
  value: /etc/nanochat/tls/tls.key
{{- end -}}
{{- end -}}

{{/* Mount of a component's Secret. A mount without subPath follows changes of the Secret. */}}
{{- define "nanochat.tlsMount" -}}
{{- if .Values.tls.enabled -}}
- name: tls
  mountPath: /etc/nanochat/tls
  readOnly: true
{{- end -}}
{{- end -}}

{{/* Volume with a component's Secret. Takes (list $ "component"). */}}
{{- define "nanochat.tlsVolume" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- if $root.Values.tls.enabled -}}
- name: tls
  secret:
    secretName: {{ required (printf "tls.secrets.%s is needed with tls.enabled=true" $component) (index $root.Values.tls.secrets $component) }}
    defaultMode: 0440
{{- end -}}
{{- end -}}

{{/* Environment variables of the export of traces. */}}
{{- define "nanochat.tracingEnv" -}}
{{- with .Values.tracing.otlpEndpoint -}}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . }}
{{- end -}}
{{- end -}}

{{/* Egress rule for the collector of traces. */}}
{{- define "nanochat.tracingEgress" -}}
{{- if .Values.tracing.otlpEndpoint -}}
- ports:
    {{- range .Values.networkPolicy.otlpPorts }}
    - {port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.otlpTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "nanochat.storeClaim" -}}
{{- default (printf "%s-store" (include "nanochat.fullname" .)) .Values.store.pvc.existingClaim -}}
{{- end -}}

{{/* Name of the Secret with the S3 keys; empty if the service account has the permission. */}}
{{- define "nanochat.s3Secret" -}}
{{- if .Values.store.s3.existingSecret -}}
{{- .Values.store.s3.existingSecret -}}
{{- else if .Values.store.s3.accessKeyId -}}
{{- include "nanochat.fullname" . }}-s3
{{- end -}}
{{- end -}}

{{/* Egress rule for DNS: pods in any namespace, and the usual address of a node's DNS cache. */}}
{{- define "nanochat.dnsEgress" -}}
- to:
    - namespaceSelector: {}
    - ipBlock: {cidr: 169.254.20.10/32}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end -}}

{{/* NetworkPolicy peers that may scrape metrics. */}}
{{- define "nanochat.metricsFrom" -}}
{{- toYaml (default (list (dict "namespaceSelector" dict)) .Values.networkPolicy.metricsFrom) -}}
{{- end -}}

{{/* Environment variables that tell the engine where the store is. */}}
{{- define "nanochat.storeEnv" -}}
{{- if eq .Values.store.type "pvc" -}}
- name: NANOCHAT_HOME
  value: /var/lib/nanochat
{{- else -}}
- name: NANOCHAT_HOME
  value: {{ required "store.s3.url is needed with store.type=s3" .Values.store.s3.url }}
- name: NANOCHAT_ENGINE_CACHE_DIR
  value: /var/cache/nanochat
- name: NANOCHAT_ENGINE_CACHE_GIB
  value: {{ .Values.engine.cacheGib | quote }}
- name: AWS_REGION
  value: {{ .Values.store.s3.region }}
{{- with .Values.store.s3.endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . }}
{{- end }}
{{- $secret := include "nanochat.s3Secret" . -}}
{{- if $secret -}}
{{- range $key := list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: {{ $key }}}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Resources of the engine. Kubernetes expects GPUs under limits. */}}
{{- define "nanochat.engineResources" -}}
{{- $resources := deepCopy .Values.engine.resources -}}
{{- if .Values.engine.gpu.count -}}
{{- $limits := set (default dict $resources.limits) .Values.engine.gpu.resourceName .Values.engine.gpu.count -}}
{{- $resources = set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
